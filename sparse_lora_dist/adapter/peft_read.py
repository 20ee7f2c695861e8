"""Read a PEFT adapter as initial values of a run (``--init_adapter``)."""

import json
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from sparse_lora_dist.adapter.peft_config import APART, CONFIG, PREFIX, WEIGHTS, other_kind
from sparse_lora_dist.errors import UserError
from sparse_lora_dist.zero3.shares import Values


def read_peft(
    folder: str, shapes: Mapping[str, tuple[int, ...]], *, rank: int, alpha: float
) -> dict[str, Values]:
    """Return initial values from a PEFT LoRA adapter with this run's rank, alpha and sites.

    Args:
        folder: adapter folder, or hub id.
        shapes: shape of every tensor that trains: "site.lora_a" [R, I], "site.lora_b" [O, R], and
            "name.weight" for modules trained in full, which the adapter need not have.
        rank: rank of the run.
        alpha: LoRA alpha of the run.

    Returns:
        Values by the names of ``shapes``. They are read from disk when called.

    Raises:
        UserError: the adapter is absent or damaged, or does not fit the run.
    """
    config, values, theirs = open_peft(folder)
    problems = []
    if kind := other_kind(config) or (config.get("use_rslora") and "use_rslora"):
        problems.append(f"it is not a plain LoRA adapter: it has {kind}")
    if config.get("rank_pattern") or config.get("alpha_pattern"):
        problems.append(
            "its modules have different ranks or alphas (rank_pattern, alpha_pattern), but a run "
            "starts with one of each"
        )
    if config.get("r") != rank:
        problems.append(f"its rank is {config.get('r')}, but --rank is {rank}")
    if config.get("lora_alpha") != alpha:
        problems.append(f"its alpha is {config.get('lora_alpha')}, but --alpha is {alpha}")
    # A problem above would only show up again in every tensor.
    if problems := problems or _mismatches(theirs, shapes):
        raise UserError(f"--init_adapter {folder}: " + "; ".join(problems))
    return values


def open_peft(
    folder: str, flag: str = "--init_adapter"
) -> tuple[dict[str, Any], dict[str, Values], dict[str, tuple[int, ...]]]:
    """Open a PEFT adapter. Tensors are named "site.lora_a", "site.lora_b" and, for modules trained
    in full, "name.weight".

    Args:
        folder: adapter folder, or hub id, which is downloaded.
        flag: command-line option that error messages name.

    Returns:
        (contents of adapter_config.json, values by tensor name, shapes by tensor name). Values are
        read from disk when called.

    Raises:
        UserError: the adapter is absent or damaged.
    """
    config, files = _open_files(folder, flag)
    saved = {_our_name(key): file.get_slice(key) for file in files for key in file.keys()}  # noqa: SIM118  safe_open is no dict
    shapes = {name: tuple(tensor.get_shape()) for name, tensor in saved.items()}
    values = {name: _range_of(tensor, shapes[name]) for name, tensor in saved.items()}
    return config, values, shapes


def _range_of(tensor: Any, shape: tuple[int, ...]) -> Values:
    # Reads only the rows that hold the range.
    columns = prod(shape[1:])

    def values(start: int, stop: int) -> Tensor:
        first_row, last_row = start // columns, -(-stop // columns)
        rows: Tensor = tensor[first_row:last_row].flatten()
        return rows[start - first_row * columns : stop - first_row * columns]

    return values


def _mismatches(
    theirs: Mapping[str, tuple[int, ...]], shapes: Mapping[str, tuple[int, ...]]
) -> list[str]:
    if other := sorted(_sites(theirs) ^ _sites(shapes)):
        return [
            f"its modules and --target_modules differ by {len(other)} (the first is {other[0]}); "
            "set --target_modules to the adapter's modules"
        ]
    if extra := sorted(theirs.keys() - shapes.keys()):
        return [f"it trained {extra[0]} in full: name that module in --modules_to_save"]
    return [
        f"its {name} has shape {list(shape)}, but this model needs {list(shapes[name])}"
        for name, shape in theirs.items()
        if shape != tuple(shapes[name])
    ][:1]


def _sites(names: Iterable[str]) -> set[str]:
    return {n.rpartition(".")[0] for n in names if n.endswith((".lora_a", ".lora_b"))}


def _open_files(folder: str, flag: str) -> tuple[dict[str, Any], list[Any]]:
    """Return the contents of adapter_config.json and the opened files of weights."""
    if not Path(folder).is_dir():
        from huggingface_hub import snapshot_download

        try:
            folder = snapshot_download(folder, allow_patterns=["adapter_*", APART])
        except Exception as error:  # the hub raises a dozen kinds
            raise UserError(
                f"{flag} {folder} is not a folder, and downloading it from the hub failed: {error}"
            ) from error
    config, weights, apart = (Path(folder) / name for name in (CONFIG, WEIGHTS, APART))
    absent = [p.name for p in (config, weights) if not p.exists()]
    if absent:
        raise UserError(
            f"{flag} {folder} has no {' and no '.join(absent)}, so it is not a PEFT adapter. Give "
            "the folder of an adapter that PEFT or this project has saved."
        )
    try:
        # An export with --uniform_rank keeps modules trained in full in a file of their own.
        there = [path for path in (weights, apart) if path.exists()]
        return json.loads(config.read_text()), [safe_open(str(p), framework="pt") for p in there]
    except (ValueError, SafetensorError) as error:
        raise UserError(f"{flag} {folder} is damaged: {error}") from error


def _our_name(key: str) -> str:
    name = key.removeprefix(PREFIX)
    for theirs, ours in (("lora_A.weight", "lora_a"), ("lora_B.weight", "lora_b")):
        if name.endswith(theirs):
            return name.removesuffix(theirs) + ours
    return name
