"""Read and check manifest.json: progress, description and list of files of a checkpoint."""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparse_lora_dist.distributed.console import counted
from sparse_lora_dist.errors import UserError
from sparse_lora_dist.optim.moments import MOMENTS
from sparse_lora_dist.system.small_files import parse_json, refuse_pipes

FORMAT = 5
"""Version of the checkpoint format."""
MANIFEST = "manifest.json"
MAPPINGS = ("progress", "description", "config", "tensors", "sites")
"""Fields of a manifest that are JSON objects."""
PACKED = (*MOMENTS, "born")
"""Kinds of values that a rank's file holds for live entries only, i.e. entries that the optimizer
steps: Adam's moments and birth steps."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """Position of a run in its learning-rate schedule and its training data."""

    step: int = 0
    """Optimizer steps done."""
    rows: int = 0
    """Number of training rows consumed: the position in the data, whatever the batch size."""
    tokens: int = 0
    """Tokens trained on, padding not counted."""


def sealed(manifest: Mapping[str, Any]) -> str:
    """Return the text of manifest.json: the given entries and a sha256 hash of them.

    Args:
        manifest: all entries but the hash, as JSON values.
    """
    return json.dumps({**manifest, "sha256": _hash(manifest)}, indent=1)


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """Return a checkpoint's manifest, after checking its hash and the sizes of the listed files.

    The hashes of the files are not checked; ``find_damage`` does that. Not a collective.

    Args:
        checkpoint: a step_... folder.

    Returns:
        Contents of manifest.json, without its hash.

    Raises:
        UserError: the manifest is absent, damaged or of another format, or a file is absent or has
            another size.
    """
    path = checkpoint / MANIFEST
    refuse_pipes(path)
    if not path.exists():
        raise UserError(
            f"{checkpoint} is not a checkpoint: it has no {MANIFEST}. Give a step_... folder."
        )
    try:
        manifest: dict[str, Any] = parse_json(path.read_bytes())
        version, digest = manifest["format"], manifest.pop("sha256", None)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{path} is damaged: {error!r}. Restore the file to use this checkpoint."
        ) from error
    if version != FORMAT:
        raise UserError(
            f"{path} has format {version}, but this version of the program reads format {FORMAT}. "
            "Use the version that saved the checkpoint."
        )
    if digest != _hash(manifest):
        raise UserError(
            f"{path} was altered after it was saved: its hash does not match. Restore the file "
            "to use this checkpoint."
        )
    if not _has_form(manifest):
        raise UserError(
            f"{path} is damaged: it does not have the fields of a manifest. Restore the file to "
            "use this checkpoint."
        )
    for file in manifest["files"]:
        there = checkpoint / file["name"]
        held = f"has {there.stat().st_size} bytes" if there.exists() else "is missing"
        if held != f"has {file['bytes']} bytes":
            raise UserError(
                f"{there} {held}, but {MANIFEST} lists it with {file['bytes']} bytes. Restore the "
                "file to use this checkpoint."
            )
    return manifest


def _has_form(manifest: Mapping[str, Any]) -> bool:
    """Return True if a manifest lists files, and its other fields have the types that they must
    have where they are there. A right hash alone does not say so: whoever forges a file can hash
    it."""
    files, mappings = manifest.get("files"), (manifest.get(name, {}) for name in MAPPINGS)
    return (
        isinstance(files, list)
        and all(isinstance(file, dict) and _is_file(file) for file in files)
        and all(isinstance(value, dict) for value in mappings)
        and isinstance(manifest.get("progress", {}).get("step", 0), int)
    )


def _is_file(entry: Mapping[str, Any]) -> bool:
    name = entry.get("name")
    return (
        isinstance(name, str)
        and Path(name).name == name
        and isinstance(entry.get("bytes"), int)
        and isinstance(entry.get("sha256"), str)
    )


def step_of(checkpoint: Path) -> int | None:
    """Return the optimizer step that the name of a checkpoint's folder has, as in step_00000100;
    None for a folder of another name, such as a copy. A run writes at least 8 digits, and no zeros
    before more than that."""
    name = re.fullmatch(r"step_([0-9]{8}|[1-9][0-9]{8,17})", checkpoint.name)
    return None if name is None else int(name[1])


def hash_of_file(path: Path) -> str:
    """Return the sha256 hash of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _hash(manifest: Mapping[str, Any]) -> str:
    # Hash what JSON gives back, in which tuples are lists and keys are strings.
    text = json.dumps(json.loads(json.dumps(manifest)), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def check_description(checkpoint: Path, saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise ``UserError`` if this run's base, method or settings are not those of a checkpoint.

    Called when a run resumes. Not a collective.

    Args:
        checkpoint: folder of the checkpoint to resume from, for the message.
        saved: description of the run in the checkpoint's manifest: name of a setting -> value.
        now: description of this run, of the same form.

    Raises:
        UserError: a setting differs. The message names each of them, with both values.
    """
    differ = [
        f"{k} was {saved.get(k)!r}, now {now.get(k)!r}"
        for k in sorted({*saved, *now})
        if saved.get(k) != now.get(k)
    ]
    if differ:
        raise UserError(
            f"{checkpoint} belongs to another run. Its settings differ: {', '.join(differ)}. "
            "Resume with the saved settings, or start a new run in another --output_dir."
        )


def check_tensors(
    checkpoint: Path, saved: Mapping[str, list[int]], now: Mapping[str, tuple[int, ...]]
) -> None:
    """Raise ``UserError`` if this run trains other tensors than a checkpoint contains.

    Called when a run resumes. Not a collective.

    Args:
        checkpoint: folder of the checkpoint to resume from, for the message.
        saved: tensor name -> shape of every trained tensor, from the checkpoint's manifest.
        now: tensor name -> shape of every tensor that this run trains.

    Raises:
        UserError: a name or a shape differs. The message has the first one, with both shapes.
    """
    ours = {name: list(shape) for name, shape in now.items()}
    differ = sorted(n for n in {*saved, *ours} if saved.get(n) != ours.get(n))
    if differ:
        raise UserError(
            f"The shapes of {counted(len(differ), 'trained tensor')} differ between this run and "
            f"{checkpoint}. The first is {differ[0]}: its saved shape is {saved.get(differ[0])}, "
            f"and now it is {ours.get(differ[0])} (None: not trained). Resume with the saved "
            "--rank, --target_modules and --modules_to_save."
        )
