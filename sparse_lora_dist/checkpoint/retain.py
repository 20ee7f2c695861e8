"""Delete checkpoints that a run no longer keeps.

``retain`` applies --keep_last and --keep_best. ``drop_later`` deletes the checkpoints of later
steps after a run went back to an earlier step with --resume FOLDER.
"""

import math
import shutil
from pathlib import Path

from sparse_lora_dist.checkpoint.manifest import read_manifest
from sparse_lora_dist.checkpoint.recover import REMOVED, published
from sparse_lora_dist.errors import UserError


def retain(newest: Path, *, keep_last: int | None, keep_best: bool) -> None:
    """Delete all checkpoints of a run but the last few and the best.

    Must be called on one rank only, after a checkpoint was published. Checkpoints of later steps
    than ``newest``, which an earlier job of the run saved, are neither counted nor deleted: the run
    will replace them.

    Args:
        newest: folder of the checkpoint that was just published.
        keep_last: number of checkpoints to keep, ``newest`` included. None keeps all.
        keep_best: True to keep the checkpoint of smallest held-out loss as well. Of equal losses,
            that of the earliest step is kept.
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
    """Delete the checkpoints of later steps than the one that was just published.

    Called on one rank only, by a run that went back to an earlier step with --resume FOLDER. An
    earlier job of the run saved the later checkpoints. If they stayed, --resume auto would resume
    from them.

    Args:
        newest: folder of the checkpoint that was just published.
    """
    for path in published(newest.parent):
        if path.name > newest.name:
            _remove(path)


def _remove(path: Path) -> None:
    # Rename first: if the job is killed here, nothing is left that looks complete.
    removed = path.with_name(f"{REMOVED}{path.name}")
    if removed.exists():  # an earlier deletion of this step was cut short
        shutil.rmtree(removed)
    shutil.rmtree(path.rename(removed))


def _held_out_loss(checkpoint: Path) -> float:
    """Return the held-out loss of a checkpoint; infinity if it has no loss or cannot be read."""
    try:
        loss = read_manifest(checkpoint)["held_out_loss"]
    except UserError:
        return math.inf
    return math.inf if loss is None or math.isnan(loss) else float(loss)
