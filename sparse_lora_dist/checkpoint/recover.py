"""Find the intact checkpoints of a run."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparse_lora_dist.checkpoint.manifest import MANIFEST, hash_of_file, read_manifest, step_of
from sparse_lora_dist.distributed import comm
from sparse_lora_dist.distributed.console import print_line
from sparse_lora_dist.distributed.phases import fail_together
from sparse_lora_dist.errors import UserError
from sparse_lora_dist.system.machine_errors import of_path


def newest_whole(folder: Path) -> Path | None:
    """Return the newest checkpoint of a run whose files all match their hashes. Collective.

    Prints a line for each newer checkpoint that is damaged or was renamed, and therefore skipped.

    Args:
        folder: the "checkpoints" folder of a run.

    Returns:
        A step_... folder; None if the folder has no published checkpoint.

    Raises:
        UserError: on all ranks, if all checkpoints are damaged: the run is not started anew,
            because that would delete its progress. Or this user may not enter or replace one.
    """
    found = published_for_all(folder)
    for path in reversed(found):
        damage = find_damage(path)
        if damage is None:
            return path
        if comm.broadcast_object(not os.access(path, os.R_OK | os.W_OK | os.X_OK)):
            raise UserError(
                f"{damage} An earlier checkpoint is not taken in its place, since the run could "
                "not save that step again.",
                shared=True,
            )
        print_line("skipped", damage)
    if found:
        raise UserError(
            f"None of the checkpoints in {folder} is intact and of this version's format. The "
            "lines above say what to do about each, or start a new run in another --output_dir.",
            shared=True,
        )
    return None


def published(folder: Path) -> list[Path]:
    """Return the folders of all published checkpoints, by ascending step. Not a collective.

    A checkpoint is published once it has a manifest. Folders with other names than a run gives
    them (see ``step_of``), like step_00000004_backup or step_4, are ignored.

    Args:
        folder: the "checkpoints" folder of a run. It need not exist.

    Raises:
        UserError: the folder cannot be read, so that nobody knows what it holds.
    """
    try:
        inside = list(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise UserError(of_path(error) or f"{folder} cannot be read: {error}") from error
    steps = ((step_of(path), path) for path in inside)
    named = sorted((step, path) for step, path in steps if step is not None)
    return [path for _, path in named if _may_have_manifest(path)]


def _may_have_manifest(checkpoint: Path) -> bool:
    """Return True if a checkpoint has a manifest, or may have one that this user cannot see. What
    is wrong with such a checkpoint, ``find_damage`` says."""
    try:
        return (checkpoint / MANIFEST).exists()
    except OSError:
        return True


def published_for_all(folder: Path) -> list[Path]:
    """Return what ``published(folder)`` returns on rank 0, on every rank. Collective.

    Ranks must not list the folder themselves: on a shared disk a node may see an older listing.

    Args:
        folder: the "checkpoints" folder of a run.
    """
    with fail_together(f"listing {folder}"):
        own = published(folder) if comm.rank() == 0 else []
    found: list[Path] = comm.broadcast_object(own)
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
        manifest = read_manifest(checkpoint)
        _check_name(checkpoint, manifest)
        for file in manifest["files"][comm.rank() :: comm.world_size()]:
            path = checkpoint / file["name"]
            if hash_of_file(path) != file["sha256"]:
                raise UserError(
                    f"{path} was altered after it was saved: its hash does not match. Restore the "
                    "file to use this checkpoint."
                )
        damage = None
    except (UserError, OSError) as error:
        damage = of_path(error) or str(error)
    return next((said for said in comm.gather_objects(damage) if said is not None), None)


def _check_name(checkpoint: Path, manifest: Mapping[str, Any]) -> None:
    """Raise UserError if a folder step_N was renamed, so that another step would count as N."""
    named, saved = step_of(checkpoint), manifest.get("progress", {}).get("step")
    if named is not None and saved is not None and named != saved:
        raise UserError(
            f"{checkpoint} was renamed: it was saved at step {saved}. Rename it to "
            f"step_{saved:08d}, or to a name that does not begin with step_."
        )
