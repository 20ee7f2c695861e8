"""``--base_cache DIR``: the 4-bit base as an ordinary model folder that any number of ranks loads.

    DIR/MODEL-KEY/    a checkpoint as bitsandbytes saves one, and what it was made of (``ABOUT``)

KEY is a hash of all that decides which bytes it holds; what of the weights goes into it are the
headers of the files and samples of every tensor, since to read all of them is what a cache is to
save. A folder gets this name once everything in it is on disk. ``cache_writer.py`` writes it.
"""

import hashlib
import json
import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from sparse_lora_dist.base_model import nf4
from sparse_lora_dist.base_model.architecture import identity
from sparse_lora_dist.base_model.safetensors_reader import CheckpointFiles
from sparse_lora_dist.base_model.same_on_all_nodes import hash_of_samples
from sparse_lora_dist.base_model.weight_map import Sources, find_keys, find_sources
from sparse_lora_dist.distributed import comm
from sparse_lora_dist.distributed.console import print_line
from sparse_lora_dist.distributed.phases import fail_together
from sparse_lora_dist.errors import UserError

FORMAT = 1
ABOUT = "base_cache.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class BaseCache:
    """The cache that belongs to this base, whether or not it is there yet."""

    folder: Path
    made_of: dict[str, Any]
    """What decides its bytes, by the name that a user knows it by."""
    dates: dict[str, int]
    """When each of the original files was changed, in ns."""
    here: bool
    """Does this node have it?"""
    damaged: int | None
    """The inode of its folder, where it is there and damaged."""
    files: CheckpointFiles | None
    """Of the cache; None unless every node has it."""
    sources: Sources
    """What it holds of the model."""

    @property
    def not_quantized(self) -> list[str]:
        """Linears that it holds in the dtype of the files."""
        return list(self.made_of["unquantised modules"])

    def can_stay(self, place: Path) -> bool:
        """Is what lies there complete, and not what was found damaged?"""
        try:
            _open_files(place, self.made_of)
            return place.stat().st_ino != self.damaged
        except (UserError, OSError):
            return False


def find_cache(
    directory: Path,
    name: str,
    folder: Path,
    files: CheckpointFiles,
    module: PreTrainedModel,
    *,
    keep: Collection[str],
    new: Collection[str],
    double_quant: bool,
) -> BaseCache:
    """The cache of the base in ``folder``. Collective.

    Args:
        name: of the model, a hub id or a path.
        keep: modules that are not quantised.
        new: parameters that the checkpoint lacks.

    Raises:
        UserError: a node has none, and cannot write one.
    """
    found: tuple[dict[str, Any], dict[str, int]] | None = None
    with fail_together("looking for the cache of the base"):
        if comm.rank() == 0:
            settings = {"double_quant": double_quant, "unquantised modules": _linears(module, keep)}
            found = _made_of(folder, files) | settings, _dates(files)
    made_of, dates = comm.broadcast_object(found)
    key = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()
    place = directory / f"{Path(name).resolve().name}-{key[:16]}"

    opened, damage, damaged = None, None, None
    with fail_together("opening --base_cache"):
        try:
            opened = open_cache(place, made_of, module, new)
        except (UserError, OSError) as error:
            damage, damaged = str(error), place.stat().st_ino
        if opened is None:
            _check_writable(directory)
    everyone = comm.gather_objects((opened is not None, damage))
    ready = all(has for has, _ in everyone)
    _say_what_was_found(place, made_of, dates, [d for _, d in everyone if d], ready=ready)
    usable, sources = opened if ready and opened else (None, {})
    return BaseCache(
        folder=place,
        made_of=made_of,
        dates=dates,
        here=opened is not None,
        damaged=damaged,
        files=usable,
        sources=sources,
    )


def open_cache(
    place: Path, made_of: dict[str, Any], module: PreTrainedModel, new: Collection[str]
) -> tuple[CheckpointFiles, Sources] | None:
    """A complete cache, None where there is none.

    Raises:
        UserError: it is damaged.
    """
    if not place.exists():
        return None
    files = _open_files(place, made_of)
    return files, find_sources(module, files, find_keys(module, files), new=new)


def _open_files(place: Path, made_of: dict[str, Any]) -> CheckpointFiles:
    if read_about(place).get("made_of") != made_of:
        raise UserError(f"{place / ABOUT} is missing, damaged, or of something else")
    return CheckpointFiles(place)


def read_about(place: Path) -> dict[str, Any]:
    """What a cache says of itself; nothing where it is damaged."""
    try:
        about: dict[str, Any] = json.loads((place / ABOUT).read_text())
    except (OSError, ValueError):
        return {}
    told = isinstance(about, dict) and isinstance(about.get("made_of"), dict)
    return about if told else {}


def _linears(module: nn.Module, keep: Collection[str]) -> list[str]:
    return sorted(n for n, m in module.named_modules() if n in keep and isinstance(m, nn.Linear))


def _made_of(folder: Path, files: CheckpointFiles) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "config.json or shapes": identity(folder, files),
        "weights": [hash_of_samples(files), *_hashes_of_the_hub(files)],
        "quantisation": f"nf4 in blocks of {nf4.BLOCK} and {nf4.NESTED_BLOCK}",
    }


def _hashes_of_the_hub(files: CheckpointFiles) -> list[str]:
    """A hub's own name of a file, to which its link leads, is a hash of all of it."""
    links = sorted({e.file for e in files.entries.values() if e.file.is_symlink()})
    return [link.resolve().name for link in links]


def _dates(files: CheckpointFiles) -> dict[str, int]:
    return {f.name: f.stat().st_mtime_ns for f in {e.file for e in files.entries.values()}}


def _check_writable(directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        writable = os.access(directory, os.W_OK)
    except OSError:
        writable = False
    if not writable:
        raise UserError(
            f"--base_cache {directory} is no folder that can be written to. Choose another, "
            "or leave it out."
        )


def _say_what_was_found(
    place: Path, made_of: dict[str, Any], dates: dict[str, int], damage: list[str], *, ready: bool
) -> None:
    """Which way the load goes, and which caches it leaves alone."""
    if comm.rank() != 0:
        return
    if ready:
        print_line("cache", f"the base is read from {place}")
        if read_about(place).get("dates") != dates:
            print_line(
                "", "the model's files have other dates than when it was made; samples of every"
            )
            print_line("", "tensor are the same. If you changed a few weights, remove that folder.")
        return
    if damage:
        print_line("cache", f"damaged, not used, to be replaced: {damage[0]}")
    name = place.name.rpartition("-")[0]
    for other in sorted(place.parent.iterdir()):
        theirs = read_about(other).get("made_of")
        if theirs and other != place and other.name.rpartition("-")[0] == name:
            differ = [k for k in made_of if theirs.get(k) != made_of[k]]
            print_line("cache", f"{other} is not used: it has other {', other '.join(differ)}")
    print_line("cache", f"there is none of this base yet: it will be written to {place}")
