"""Delete checkpoints that a run no longer keeps (--keep_last and --keep_best)."""

import math
from pathlib import Path
from typing import Any

from sparse_lora_dist.checkpoint.manifest import read_manifest
from sparse_lora_dist.checkpoint.own_files import own_files, remove, remove_left
from sparse_lora_dist.checkpoint.recover import published
from sparse_lora_dist.errors import UserError


def retain(newest: Path, *, keep_last: int | None, keep_best: bool) -> None:
    """Delete all checkpoints of a run but the last few and the best.

    Must be called on one rank only, after a checkpoint was published. No error is raised: what
    cannot be deleted is a warning, and is tried again at the next call. Checkpoints of later steps
    than ``newest``, which an earlier job of the run saved, are neither counted nor deleted: the run
    will replace them. Neither are damaged checkpoints and renamed folders.

    Args:
        newest: folder of the checkpoint that was just published.
        keep_last: number of checkpoints to keep, ``newest`` included. None keeps all.
        keep_best: True to keep the checkpoint of smallest held-out loss as well. Of equal losses,
            that of the earliest step is kept. Losses over other parts of the held-out rows are not
            compared: the best of each is kept.
    """
    remove_left(newest.parent)
    if keep_last is None:
        return
    found = [p for p in published(newest.parent) if p.name <= newest.name and own_files(p)]
    kept = set(found[-keep_last:])
    if keep_best:
        alike: dict[Any, list[Path]] = {}
        losses = {path: _held_out_loss(path) for path in found}
        for path in (p for p in found if losses[p] < math.inf):
            alike.setdefault(_held_out(path, "held_out_rows"), []).append(path)
        kept |= {min(some, key=lambda p: (losses[p], p.name)) for some in alike.values()}
    for path in found:
        if path not in kept:
            remove(path)


def _held_out_loss(checkpoint: Path) -> float:
    """Return the held-out loss of a checkpoint; infinity if it has no loss or cannot be read."""
    loss = _held_out(checkpoint, "held_out_loss")
    return math.inf if loss is None or math.isnan(loss) else float(loss)


def _held_out(checkpoint: Path, key: str) -> Any:
    """Return a field of a checkpoint's manifest; None if it has none or cannot be read."""
    try:
        return read_manifest(checkpoint).get(key)
    except UserError:
        return None
