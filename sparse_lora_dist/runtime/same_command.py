"""Check that all ranks were started with the same options.

A command that is typed on each node may differ from node to node. Each rank would train its shard
by its own options, or the ranks would wait for each other in different collectives.
"""

import json
import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from sparse_lora_dist.config.config import Config
from sparse_lora_dist.config.deepspeed_file import load
from sparse_lora_dist.config.paths import PATHS, expanded, looks_local
from sparse_lora_dist.distributed import comm
from sparse_lora_dist.distributed.phases import fail_together
from sparse_lora_dist.errors import UserError

OF_A_RANK = frozenset("debug device trackers output answers time_limit signal_lead".split())
"""Options that may differ: they change nothing that is computed, only rank 0 uses them, or (the
last two) the first rank whose time is over stops all."""
WORDS: Mapping[str, tuple[str, ...]] = {
    "model": ("default",),
    "data": ("default",),
    "eval_data": ("default",),
    "init_adapter": (),
    "adapter": ("base",),
    "compare": ("base",),
    "resume": ("auto", "never"),
}
"""{option: values that are no paths}. A value that is no path that exists here, and does not look
like one, is no path either, but a hub id."""
NOT_COMPARED_LATER = ("resume",)
"""Options with paths whose content is not compared between the nodes when it is read."""
ON_A_NODE = ("nvme_path",)
"""Keys of a DeepSpeed file whose values are places on a disk of each node."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Given:
    """Value of an option on one rank."""

    shown: str
    """The value for messages, paths as absolute ones."""
    everywhere: object
    """What must be equal on all ranks. Of a path only that it is one: a disk may have another name
    on each machine, and what is read there is compared later."""
    here: object = None
    """What must be equal on the ranks of one machine: the absolute paths."""


def check_same_command(config: Config, own: Mapping[str, object] | None = None) -> None:
    """Raise UserError if the ranks were started with different options. Collective.

    To be called after ``comm.start``, before anything is read.

    Args:
        config: options of the run.
        own: {option: value} of what only this program has, or has in place of an option of the
            run. Names with a space are no options, such as "content of --edits".

    Raises:
        UserError: some options differ. The message, the same on all ranks, names all of them with
            two ranks and their values.
    """
    with fail_together("reading the options"):
        options = given(config.as_flat_dict() | dict(own or {}))
    everyone = comm.gather_objects((socket.gethostname(), options), after="reading the options")
    if differ := differences(everyone):
        raise UserError(
            "Not all ranks were started with the same options:\n"
            + "".join(f"  - {one}\n" for one in differ)
            + "Give all nodes the same command with the same --config and --ds_config files, and "
            "start all ranks of a machine in the same folder.",
            shared=True,
        )


def given(flat: Mapping[str, object]) -> dict[str, Given]:
    """Return what is compared of each option. Not a collective.

    Args:
        flat: {option: value} of all options.

    Raises:
        ConfigError: the file of --ds_config cannot be read.
    """
    return {name: _given(name, value) for name, value in flat.items() if name not in OF_A_RANK}


def _given(name: str, value: Any) -> Given:
    if name == "ds_config":
        content = json.dumps(_without_places(load(value)[0]), sort_keys=True)
        digest = sha256(content.encode()).hexdigest()[:12]
        return Given(shown=f"{value} with the content {digest}", everywhere=content)
    if name not in PATHS or value is None:
        return Given(shown=_shown(value), everywhere=value)
    texts = [value] if isinstance(value, str) else list(value)
    shown = [_place(name, text) or text for text in texts]
    kinds = ["a path" if _place(name, text) else text for text in texts]
    return Given(
        shown=", ".join(shown),
        everywhere=texts if name in NOT_COMPARED_LATER else kinds,
        here=shown,
    )


def _place(name: str, text: str) -> str | None:
    """Return the absolute path, without symbolic links, that a value of an option is; None if it is
    a word or a hub id."""
    path = expanded(text)
    words = WORDS.get(name)
    if words is not None and (text in words or not (looks_local(text) or Path(path).exists())):
        return None
    return os.path.realpath(path)


def _without_places(engine: Any) -> Any:
    """Return the content of a DeepSpeed file without the keys ``ON_A_NODE``."""
    if not isinstance(engine, dict):
        return engine
    return {key: _without_places(v) for key, v in engine.items() if key not in ON_A_NODE}


def _shown(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


def differences(everyone: Sequence[tuple[str, Mapping[str, Given]]]) -> list[str]:
    """Return a line for each option that differs, in the order of rank 0's options.

    Args:
        everyone: (host, its options from ``given``) of each rank. Options that only some ranks have
            are those of a method or program, which differs then, and are not compared.

    Returns:
        The lines. Each names two ranks, the second of which is the first that differs.
    """
    return [
        f"{f'--{name}' if name.isidentifier() else name}: "
        + ", ".join(f"{everyone[r][1][name].shown} on rank {r} ({everyone[r][0]})" for r in pair)
        for name in everyone[0][1]
        if (pair := _first_pair(name, everyone)) is not None
    ]


def _first_pair(
    name: str, everyone: Sequence[tuple[str, Mapping[str, Given]]]
) -> tuple[int, int] | None:
    """Return the first rank whose value of an option is wrong, after the rank that it differs from:
    rank 0 or the first of its machine. None if no rank differs."""
    first_of: dict[str, int] = {}
    for rank, (host, options) in enumerate(everyone):
        first = first_of.setdefault(host, rank)
        if name not in options:
            continue
        if options[name].everywhere != everyone[0][1][name].everywhere:
            return 0, rank
        before = everyone[first][1]
        if name in before and options[name].here != before[name].here:
            return first, rank
    return None
