"""The checkpoints of a run, read from their manifests."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparse_lora_dist.checkpoint import published, read_manifest
from sparse_lora_dist.errors import UserError


@dataclass(frozen=True, kw_only=True)
class SavedStep:
    """A published checkpoint."""

    path: Path
    manifest: Mapping[str, Any]
    """Empty if the checkpoint is damaged."""
    damage: str | None = None
    """What is wrong with the checkpoint; None if its manifest is readable."""

    @property
    def step(self) -> int:
        return int(self.path.name.removeprefix("step_"))

    @property
    def peaks(self) -> list[int]:
        """Peak memory of every rank up to this step, in bytes; empty if it is not recorded."""
        files = self.manifest.get("files", [])
        return [f["peak_memory_bytes"] for f in files if "peak_memory_bytes" in f]


def saved_steps(folder: Path) -> list[SavedStep]:
    """Published checkpoints in ``folder``, by step."""
    found = map(_read, published(folder))
    return [saved for saved in found if saved is not None]


def _read(path: Path) -> SavedStep | None:
    try:
        return SavedStep(path=path, manifest=read_manifest(path))
    except (UserError, OSError) as error:
        if not path.exists():  # the running job has just removed it (--keep_last)
            return None
        return SavedStep(path=path, manifest={}, damage=str(error))
