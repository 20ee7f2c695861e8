"""Which checkpoints of a run stay."""

import math
import shutil
from pathlib import Path

from sparse_lora_dist.checkpoint.manifest import read_manifest
from sparse_lora_dist.checkpoint.recover import REMOVED, published
from sparse_lora_dist.errors import UserError


def retain(newest: Path, *, keep_last: int | None, keep_best: bool) -> None:
    """Remove what ``newest``, just published, makes superfluous: all but the last ``keep_last``
    (None: all) and, if wanted, the one of the smallest held-out loss. For one rank.

    Later steps, which an earlier attempt left, are not counted: the run has yet to replace them.
    """
    if keep_last is None:
        return
    found = [path for path in published(newest.parent) if path.name <= newest.name]
    kept = set(found[-keep_last:])
    if keep_best:
        kept.add(min(found, key=lambda path: (_held_out_loss(path), path.name)))
    for path in found:
        if path not in kept:
            _remove(path)


def drop_later(newest: Path) -> None:
    """Remove what an earlier attempt saved after the step of ``newest``: a run that went back to an
    earlier step by name would go on from there. For one rank."""
    for path in published(newest.parent):
        if path.name > newest.name:
            _remove(path)


def _remove(path: Path) -> None:
    # Its name goes first: killed now, this leaves nothing that looks complete.
    removed = path.with_name(f"{REMOVED}{path.name}")
    if removed.exists():  # a removal of this step was cut short before
        shutil.rmtree(removed)
    shutil.rmtree(path.rename(removed))


def _held_out_loss(checkpoint: Path) -> float:
    """Of its step; infinite where none was taken, or where it cannot be read."""
    try:
        loss = read_manifest(checkpoint)["held_out_loss"]
    except UserError:
        return math.inf
    return math.inf if loss is None or math.isnan(loss) else float(loss)
