"""Tell a run whose checkpoints were removed from a run that was killed before its first one.

Both have a run folder without a checkpoint. The second begins anew. The first must not: its adapter
and its records would be replaced.
"""

from collections.abc import Callable, Container
from pathlib import Path
from typing import Any

from sparse_lora_dist.run_folder.attempts import NAME as ATTEMPTS
from sparse_lora_dist.run_folder.metrics_file import read_records

CHECKPOINTS, LATEST, METRICS = "checkpoints", "latest", "metrics.jsonl"


def signs_of_checkpoints(
    folder: Path, claimed: Container[str], is_of_adapter: Callable[[str], bool]
) -> list[str]:
    """Return what shows that a run has saved a checkpoint in its folder, where none is now.

    Not a collective.

    Args:
        folder: the run folder, without a checkpoint.
        claimed: names of the entries that the run has made there. A run claims ``checkpoints``
            after it has made that folder.
        is_of_adapter: function that takes the name of an entry of ``folder/adapter``, and returns
            True if the run has written it.

    Returns:
        Words for a message, one for each sign. Empty for a run that was killed before its first
        checkpoint, or was stopped before its first step.
    """
    adapter, steps = folder / "adapter", folder / CHECKPOINTS
    signs = []
    if adapter.is_dir() and any(is_of_adapter(path.name) for path in adapter.iterdir()):
        signs.append("adapter/")
    if job := next((r for r in reversed(_records(folder / ATTEMPTS)) if r["step"] > 0), None):
        signs.append(f"{ATTEMPTS} (a job {job.get('event')} at step {job['step']})")
    if (steps / LATEST).is_file():
        signs.append(f"{CHECKPOINTS}/{LATEST}")
    if CHECKPOINTS in claimed and not steps.exists():
        reached = max((r["step"] for r in _records(folder / METRICS)), default=0)
        signs += [f"{METRICS} (up to step {reached})"] if reached > 0 else []
    return signs


def _records(path: Path) -> list[dict[str, Any]]:
    return read_records(path) if path.is_file() else []
