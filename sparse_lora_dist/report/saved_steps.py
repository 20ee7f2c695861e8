"""The checkpoints of a run, as far as their manifests tell."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparse_lora_dist.checkpoint import published, read_manifest
from sparse_lora_dist.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Saved:
    """A published checkpoint."""

    path: Path
    manifest: Mapping[str, Any]
    """Empty where it is damaged."""
    damage: str | None = None

    @property
    def step(self) -> int:
        return int(self.path.name.removeprefix("step_"))

    @property
    def peaks(self) -> list[int]:
        """Peak memory of every rank until then; empty where that was not written down."""
        files = self.manifest.get("files", [])
        return [f["peak_memory_bytes"] for f in files if "peak_memory_bytes" in f]


def saved_in(folder: Path) -> list[Saved]:
    """By step."""
    found = map(_read, published(folder))
    return [saved for saved in found if saved is not None]


def _read(path: Path) -> Saved | None:
    try:
        return Saved(path=path, manifest=read_manifest(path))
    except (UserError, OSError) as error:
        if not path.exists():  # --keep_last has just removed it
            return None
        return Saved(path=path, manifest={}, damage=str(error))
