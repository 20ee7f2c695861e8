"""Lists the checkpoints of a run with the content of their manifest.json files."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparse_lora_dist.checkpoint import published, read_manifest
from sparse_lora_dist.errors import UserError


@dataclass(frozen=True, kw_only=True)
class SavedStep:
    """A checkpoint that was written in full: its folder, and its manifest or why that cannot be
    read."""

    path: Path
    """Folder of the checkpoint, step_N for optimizer step N."""
    manifest: Mapping[str, Any]
    """Content of its manifest.json; empty if that file is damaged."""
    damage: str | None = None
    """Error message about the manifest; None if the manifest is readable."""

    @property
    def step(self) -> int:
        """Optimizer step after which the checkpoint was saved."""
        return int(self.path.name.removeprefix("step_"))

    @property
    def peaks(self) -> list[int]:
        """Peak memory of each rank from the start of its job to this step, in bytes; empty if it is
        not recorded."""
        files = self.manifest.get("files", [])
        return [f["peak_memory_bytes"] for f in files if "peak_memory_bytes" in f]


def saved_steps(folder: Path) -> list[SavedStep]:
    """Return the checkpoints that are written in full in ``folder``, the folder "checkpoints" of a
    run, ordered by step."""
    found = map(_read, published(folder))
    return [saved for saved in found if saved is not None]


def _read(path: Path) -> SavedStep | None:
    """Return the checkpoint in the folder ``path``, or None if it has been removed meanwhile."""
    try:
        return SavedStep(path=path, manifest=read_manifest(path))
    except (UserError, OSError) as error:
        if not path.exists():  # the running job has just removed it (--keep_last)
            return None
        return SavedStep(path=path, manifest={}, damage=str(error))
