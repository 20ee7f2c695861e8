"""The manifest of a checkpoint: what it is, how far the run was, which files belong to it."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparse_lora_dist.errors import UserError
from sparse_lora_dist.optim.moments import MOMENTS

FORMAT = 5
MANIFEST = "manifest.json"
PACKED = (*MOMENTS, "born")
"""What is saved for live entries only."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """How far a run is."""

    step: int = 0
    """Optimizer steps done."""
    rows: int = 0
    """Rows of the stream consumed: the data position, whatever the batch size."""
    tokens: int = 0
    """Tokens that went through the model, padding not counted."""


def sealed(manifest: Mapping[str, Any]) -> str:
    """The text of a manifest, with a hash of all that it says."""
    return json.dumps({**manifest, "sha256": _hash(manifest)}, indent=1)


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """The manifest, after checking that it is as it was written and that every file it names is
    there in its full size.

    Raises:
        UserError: without saying what to do instead, which the caller knows.
    """
    path = checkpoint / MANIFEST
    if not path.exists():
        raise UserError(
            f"{checkpoint} is no checkpoint: it has no {MANIFEST}. Name a step_... folder."
        )
    try:
        manifest: dict[str, Any] = json.loads(path.read_text())
        version, digest = manifest["format"], manifest.pop("sha256", None)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged: {error!r}.") from error
    if version != FORMAT:
        raise UserError(f"{path} has format {version}; this version reads {FORMAT}.")
    if digest != _hash(manifest):
        raise UserError(f"{path} was altered after it was saved.")
    for file in manifest["files"]:
        there = checkpoint / file["name"]
        size = there.stat().st_size if there.exists() else 0
        if size != file["bytes"]:
            raise UserError(f"{there} has {size} bytes, the manifest says {file['bytes']}.")
    return manifest


def hash_of_file(path: Path) -> str:
    """sha256 of all its bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _hash(manifest: Mapping[str, Any]) -> str:
    # As JSON gives it back: tuples are lists there, and keys are text.
    text = json.dumps(json.loads(json.dumps(manifest)), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def check_description(checkpoint: Path, saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse to go on with another base, method ... than was saved; name each that differs."""
    differ = [
        f"{k} was {saved.get(k)!r}, now {now.get(k)!r}"
        for k in sorted({*saved, *now})
        if saved.get(k) != now.get(k)
    ]
    if differ:
        raise UserError(f"{checkpoint} belongs to another run: " + "; ".join(differ))


def check_tensors(
    checkpoint: Path, saved: Mapping[str, list[int]], now: Mapping[str, tuple[int, ...]]
) -> None:
    """Refuse to go on with other trained tensors than were saved; name the first that differs."""
    ours = {name: list(shape) for name, shape in now.items()}
    differ = sorted(n for n in {*saved, *ours} if saved.get(n) != ours.get(n))
    if differ:
        raise UserError(
            f"{checkpoint}: {len(differ)} trained tensors differ, the first is {differ[0]}: "
            f"saved {saved.get(differ[0])}, now {ours.get(differ[0])}. "
            "Resume with the saved --rank, --target_modules and --modules_to_save."
        )
