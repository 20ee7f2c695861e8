"""Find and open the cache of a quantised base in the folder given as ``--base_cache DIR``.

A cache is the folder DIR/MODEL-KEY, which any number of ranks can load. It holds

    config.json, *.safetensors    base files, as transformers saves a model that bitsandbytes
                                  quantised
    base_cache.json               description of what the cache was made from

MODEL is the last part of the model's name. KEY is the beginning of a hash of everything that
determines the bytes of the cache. The cache saves the time of reading all original weights, so the
hash does not read them all either: of the original files it covers config.json, the headers, and
samples of every tensor. ``writer.py`` writes the cache.
"""

import hashlib
import json
import os
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from sparse_lora_dist.base_model import nf4
from sparse_lora_dist.base_model.architecture import identity
from sparse_lora_dist.base_model.cache.content import find_damage, who_else_can_write
from sparse_lora_dist.base_model.safetensors_reader import CheckpointFiles
from sparse_lora_dist.base_model.same_on_all_nodes import hash_of_samples
from sparse_lora_dist.base_model.weight_map import Sources, find_keys, find_sources
from sparse_lora_dist.distributed import comm
from sparse_lora_dist.distributed.console import print_line
from sparse_lora_dist.distributed.phases import fail_together, passes_later
from sparse_lora_dist.errors import StorageError, UserError
from sparse_lora_dist.system.small_files import parse_json, refuse_pipes

FORMAT = 1
"""Version of the cache's format. A cache of another version is not used."""
ABOUT = "base_cache.json"
"""Name of the file that describes what a cache was made from."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BaseCache:
    """Result of ``find_cache``: where the cache of one base model is, and whether it can be used.

    The cache may not exist yet. ``here`` and ``damaged`` describe this node's disk, and may differ
    between nodes.
    """

    folder: Path
    """Path of the cache's folder DIR/MODEL-KEY, whether it exists or not."""
    made_of: dict[str, Any]
    """Everything that determines the bytes of the cache: hashes of the original files ("config.json
    or shapes", "weights"), the settings of the quantisation ("quantisation", "double_quant",
    "unquantised modules") and the version of the format ("format"). For each other cache of a model
    of the same name, the user is shown which of these keys differ."""
    dates: dict[str, int]
    """Modification times of the original safetensors files, in ns, by file name."""
    here: bool
    """True if this node has the cache, and it is not damaged."""
    damaged: int | None
    """Inode number of the cache's folder if it is damaged, otherwise None. It tells the damaged
    folder from one that another job puts in its place later."""
    files: CheckpointFiles | None
    """The opened files of the cache; None unless every node has the cache."""
    sources: Sources
    """Dict: name of a parameter -> where the files of the cache hold its values. Empty if ``files``
    is None."""

    @property
    def not_quantized(self) -> list[str]:
        """Names of the linear layers that are not quantised."""
        return list(self.made_of["unquantised modules"])

    def can_stay(self, place: Path) -> bool:
        """Return True if a folder is a complete cache of this base, which must not be replaced.

        Returns False for the folder that ``find_cache`` found damaged.

        Args:
            place: path of the folder, which may be missing.
        """
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
    """Find the cache of a base, and open it if every node has it. Collective.

    Rank 0 prints whether the cache is used. If not, it also prints for each other cache of a model
    of the same name why that one is not used.

    Args:
        directory: value of ``--base_cache``.
        name: hub id or path of the model.
        folder: local folder of the model.
        files: the opened original safetensors files.
        module: the model on the meta device.
        keep: names of modules that are not quantised.
        new: names of parameters that the files need not hold, such as those of a new classification
            head.
        double_quant: True if the scales of the 4-bit weights are quantised too.

    Returns:
        The cache. If its ``files`` are None, load the original files, and then write the cache with
        ``writer.write_cache``.

    Raises:
        UserError: a node has no cache, and ``directory`` cannot be written to.
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
            damage = str(error)
    altered = _altered(place, opened=opened is not None)
    with fail_together("opening --base_cache"):
        damage = damage or altered
        if damage is not None:
            opened, damaged = None, place.stat().st_ino
        if opened is None:
            _check_writable(directory)
    everyone = comm.gather_objects((opened is not None, damage))
    ready = all(has for has, _ in everyone)
    _print_what_was_found(place, made_of, dates, [d for _, d in everyone if d], ready=ready)
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
    """Open a base cache and find where its files hold each parameter.

    It communicates nothing, but all ranks must call it, as for ``weight_map.find_sources``.

    Args:
        place: folder of the cache.
        made_of: what the cache must have been made from (``BaseCache.made_of``).
        module: the model on the meta device.
        new: names of parameters that the files need not hold.

    Returns:
        Tuple of the opened files and a dict from the name of each parameter to where the files hold
        it. None if there is no such folder.

    Raises:
        UserError: the cache is damaged, or was made from something else.
    """
    if not place.exists():
        return None
    files = _open_files(place, made_of)
    return files, find_sources(module, files, find_keys(module, files), new=new)


def _altered(place: Path, *, opened: bool) -> str | None:
    """Compare the bytes of a cache with the hashes in its base_cache.json. Collective.

    The ranks that read the same copy, on one node or on a disk that nodes share, check different
    blocks of it, so that each byte is read once.

    Args:
        place: folder of the cache.
        opened: True if this rank could open the cache; otherwise it checks nothing.

    Returns:
        Sentence that names a damaged file of this rank's copy; None if it is intact, or was written
        by a version that stored no hashes.
    """
    copy, problem = None, None
    with suppress(OSError):
        about = (place / ABOUT).stat()
        copy = (about.st_ino, about.st_mtime_ns) if opened else None
    copies = comm.gather_objects(copy)
    same = [rank for rank, other in enumerate(copies) if other == copy]
    if opened:
        hashes = read_about(place).get("sha256", {})
        try:
            problem = find_damage(place, hashes, same.index(comm.rank()), len(same))
        except OSError as error:
            problem = str(error)
    problems = comm.gather_objects(problem)
    return next((problems[rank] for rank in same if problems[rank]), None)


def _open_files(place: Path, made_of: dict[str, Any]) -> CheckpointFiles:
    """Open the safetensors files of a cache, without looking up the parameters.

    Args:
        place: folder of the cache.
        made_of: what the cache must have been made from (``BaseCache.made_of``).

    Raises:
        UserError: the cache is damaged, or was made from something else.
    """
    about = read_about(place)
    if about.get("made_of") != made_of:
        raise UserError(
            f"{place} is no cache of this base: {ABOUT} in it is missing, damaged, or describes "
            "another base. Delete the folder, or give another --base_cache."
        )
    files = CheckpointFiles(place)
    hashed = about.get("sha256")
    strange = {entry.file.name for entry in files.entries.values()} - set(hashed or ())
    if hashed is not None and strange:
        raise UserError(
            f"{place / min(strange)} was not there when the cache was written. Delete the file, or "
            "give another --base_cache."
        )
    return files


def read_about(place: Path) -> dict[str, Any]:
    """Return the content of a cache's base_cache.json, or {} if it is missing or damaged.

    Args:
        place: folder of the cache.

    Returns:
        Dict with the keys "made_of" and "dates" (see ``BaseCache``), "model", the path of the
        folder of the original files, and "sha256", what ``content.hashes_of`` returned; caches of
        earlier versions lack the last.
    """
    refuse_pipes(place / ABOUT)
    try:
        about: dict[str, Any] = parse_json((place / ABOUT).read_bytes())
    except (OSError, ValueError):
        return {}
    valid = isinstance(about, dict) and isinstance(about.get("made_of"), dict)
    hashes = about.get("sha256", {}) if valid else None
    valid = isinstance(hashes, dict) and all(isinstance(h, list) for h in hashes.values())
    return about if valid else {}


def _linears(module: nn.Module, keep: Collection[str]) -> list[str]:
    return sorted(n for n, m in module.named_modules() if n in keep and isinstance(m, nn.Linear))


def _made_of(folder: Path, files: CheckpointFiles) -> dict[str, Any]:
    """Return the part of ``BaseCache.made_of`` that depends on the original files, not on options.

    Args:
        folder: local folder of the model.
        files: the opened original safetensors files.
    """
    return {
        "format": FORMAT,
        "config.json or shapes": identity(folder, files),
        "weights": [hash_of_samples(files), *_hub_hashes(files)],
        "quantisation": f"nf4 in blocks of {nf4.BLOCK} and {nf4.NESTED_BLOCK}",
    }


def _hub_hashes(files: CheckpointFiles) -> list[str]:
    """Return the content hashes of those original files that are links into the Hugging Face cache.

    There the name of a link's target is the hash of its content, so nothing has to be read.
    """
    links = sorted({e.file for e in files.entries.values() if e.file.is_symlink()})
    return [link.resolve().name for link in links]


def _dates(files: CheckpointFiles) -> dict[str, int]:
    return {f.name: f.stat().st_mtime_ns for f in {e.file for e in files.entries.values()}}


def _check_writable(directory: Path) -> None:
    """Make the folder of ``--base_cache``.

    Args:
        directory: value of ``--base_cache``.

    Raises:
        StorageError: it cannot be made for a reason that may pass, such as a full disk or quota.
        UserError: it is no folder that this process can write.
    """
    why = ""
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if passes_later(error):
            raise StorageError(
                f"--base_cache {directory} cannot be made: {error}. Free space there, or wait "
                "until its disk is back, and start again, or choose another folder."
            ) from error
        why = f" ({os.strerror(error.errno or 0)})"
    if why or not os.access(directory, os.W_OK):
        raise UserError(
            f"--base_cache {directory} is not a writable folder{why}. Choose another folder, or do "
            "not give --base_cache."
        )


def _print_what_was_found(
    place: Path, made_of: dict[str, Any], dates: dict[str, int], damage: list[str], *, ready: bool
) -> None:
    """Print on rank 0 whether the cache is used, or else why no cache of this model can be used.

    Args:
        place: path of the cache.
        made_of: what the cache is made from (``BaseCache.made_of``).
        dates: modification times of the original safetensors files (``BaseCache.dates``).
        damage: one reason for each rank whose cache is damaged; empty if none is.
        ready: True if every node has the cache, so that it is used.
    """
    if comm.rank() != 0:
        return
    if ready:
        print_line("cache", f"the base is read from {place}")
        _print_doubts(place)
        if read_about(place).get("dates") != dates:
            print_line(
                "",
                "the model's files have other dates than when the cache was written, but samples",
            )
            print_line(
                "", "of every tensor are the same. If you changed a few weights, remove the cache."
            )
        return
    if damage:
        print_line("cache", f"the cache is damaged and not used, and will be replaced: {damage[0]}")
    name = place.name.rpartition("-")[0]
    for other in sorted(place.parent.iterdir()):
        theirs = read_about(other).get("made_of")
        if theirs and other != place and other.name.rpartition("-")[0] == name:
            differ = [k for k in made_of if theirs.get(k) != made_of[k]]
            print_line("cache", f"{other} is not used: it differs in {', '.join(differ)}")
    print_line("cache", f"no cache can be used for this base. One will be written to {place}")


def _print_doubts(place: Path) -> None:
    """Print why the weights of a cache that is used might not be those that were written to it."""
    if "sha256" not in read_about(place):
        print_line(
            "note",
            "the cache was written by a version that stored no hashes of its bytes, so they cannot "
            "be checked. Remove it to have it written anew",
        )
    if who := who_else_can_write(place):
        print_line(
            "warning",
            f"{who} can change the weights of this cache and their hashes. If you do not trust "
            "that, give a --base_cache of your own",
        )
