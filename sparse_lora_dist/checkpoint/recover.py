"""Find the intact checkpoints of a run, and clean up after a job that was killed while saving."""

import os
import shutil
from pathlib import Path

from sparse_lora_dist.checkpoint.manifest import MANIFEST, hash_of_file, read_manifest
from sparse_lora_dist.distributed import comm
from sparse_lora_dist.distributed.console import print_line
from sparse_lora_dist.errors import UserError
from sparse_lora_dist.system.atomic_files import REPLACED, TEMPORARY

REMOVED = ".removed_"
"""Prefix of the name of a checkpoint that is being deleted."""
LATEST = "latest"
"""Text file with the name of the newest checkpoint. It is for people: no code reads it, because
another node may still see an old one on a shared disk."""


def newest_whole(folder: Path) -> Path | None:
    """Return the newest checkpoint of a run whose files all match their hashes. Collective.

    Prints a line for each newer checkpoint that is damaged and therefore skipped.

    Args:
        folder: the "checkpoints" folder of a run.

    Returns:
        A step_... folder; None if the folder has no published checkpoint.

    Raises:
        UserError: on all ranks, if all checkpoints are damaged. The run is not started anew,
            because that would delete its progress.
    """
    found = published_for_all(folder)
    for path in reversed(found):
        damage = find_damage(path)
        if damage is None:
            return path
        print_line("skipped", damage)
    if found:
        raise UserError(
            f"None of the checkpoints in {folder} is intact; the lines above name the damage. "
            "Restore these files, or start a new run in another --output_dir.",
            shared=True,
        )
    return None


def published(folder: Path) -> list[Path]:
    """Return the folders of all published checkpoints, by ascending step. Not a collective.

    A checkpoint is published once it has a manifest. Folders with other names than step_<digits>,
    like step_00000004_backup, are ignored.

    Args:
        folder: the "checkpoints" folder of a run.
    """
    named = (p for p in folder.glob("step_*") if p.name.removeprefix("step_").isdecimal())
    return sorted(p for p in named if (p / MANIFEST).exists())


def published_for_all(folder: Path) -> list[Path]:
    """Return what ``published(folder)`` returns on rank 0, on every rank. Collective.

    Ranks must not list the folder themselves: on a shared disk a node may see an older listing.

    Args:
        folder: the "checkpoints" folder of a run.
    """
    found: list[Path] = comm.broadcast_object(published(folder) if comm.rank() == 0 else [])
    return found


def find_damage(checkpoint: Path) -> str | None:
    """Check all files of a checkpoint, and return a message about the first damaged one.

    The size and sha256 hash of every file are compared with the manifest. Each file is hashed by
    one of the ranks, so that it is read once. Collective.

    Args:
        checkpoint: a step_... folder.

    Returns:
        A sentence that names the file and its damage, the same on every rank; None if the
        checkpoint is intact.
    """
    try:
        for file in read_manifest(checkpoint)["files"][comm.rank() :: comm.world_size()]:
            path = checkpoint / file["name"]
            if hash_of_file(path) != file["sha256"]:
                raise UserError(
                    f"{path} was altered after it was saved: its hash does not match. Restore the "
                    "file to use this checkpoint."
                )
        damage = None
    except (UserError, OSError) as error:
        damage = str(error)
    return next((said for said in comm.gather_objects(damage) if said is not None), None)


def clean(folder: Path) -> None:
    """Remove what a killed job left: half-written, half-deleted and replaced checkpoints.

    Called on one rank before a job goes on with a run. A checkpoint that was moved aside to be
    replaced gets its name back if its replacement is missing. Not a collective.

    Args:
        folder: the "checkpoints" folder of a run.
    """
    for left in folder.glob(f"{REPLACED}*"):
        final = folder / left.name.removeprefix(REPLACED)
        if final.exists():
            shutil.rmtree(left)
        else:
            os.rename(left, final)
    for left in (*folder.glob(f"{TEMPORARY}*"), *folder.glob(f"{REMOVED}*")):
        shutil.rmtree(left) if left.is_dir() else left.unlink()
