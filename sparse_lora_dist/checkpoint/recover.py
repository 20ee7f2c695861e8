"""Which checkpoints of a run are whole, and what a killed job left behind beside them."""

import os
import shutil
from pathlib import Path

from sparse_lora_dist.checkpoint.manifest import MANIFEST, hash_of_file, read_manifest
from sparse_lora_dist.distributed import comm
from sparse_lora_dist.distributed.console import print_line
from sparse_lora_dist.errors import UserError
from sparse_lora_dist.system.atomic_files import REPLACED, TEMPORARY

REMOVED = ".removed_"
"""Before the name of a step that is being deleted."""
LATEST = "latest"
"""File with the name of the checkpoint published last: a hint for people, which nothing here
reads, since another node may see an old one."""


def newest_whole(folder: Path) -> Path | None:
    """The newest published checkpoint of ``folder`` that is as it was saved; None where none was
    saved. A damaged one is skipped with a line that names the file. Collective.

    Raises:
        UserError: all are damaged: to start afresh is for a person to decide.
    """
    found = published_for_all(folder)
    for path in reversed(found):
        damage = find_damage(path)
        if damage is None:
            return path
        print_line("skipped", damage)
    if found:
        raise UserError(
            f"no checkpoint of {folder} is whole, see above. Start afresh in another --output_dir.",
            shared=True,
        )
    return None


def published(folder: Path) -> list[Path]:
    """Checkpoints by step; not a copy that somebody called step_00000004_backup. Not a
    collective."""
    named = (p for p in folder.glob("step_*") if p.name.removeprefix("step_").isdecimal())
    return sorted(p for p in named if (p / MANIFEST).exists())


def published_for_all(folder: Path) -> list[Path]:
    """Rank 0's listing: other nodes may see one of a while ago. Collective."""
    found: list[Path] = comm.broadcast_object(published(folder) if comm.rank() == 0 else [])
    return found


def find_damage(checkpoint: Path) -> str | None:
    """What keeps it from being read, None where all is as it was saved. Each rank reads some of the
    files, so that all are read once. Collective."""
    try:
        for file in read_manifest(checkpoint)["files"][comm.rank() :: comm.world_size()]:
            path = checkpoint / file["name"]
            if hash_of_file(path) != file["sha256"]:
                raise UserError(f"{path} was altered after it was saved.")
        damage = None
    except (UserError, OSError) as error:
        damage = str(error)
    return next((said for said in comm.gather_objects(damage) if said is not None), None)


def clean(folder: Path) -> None:
    """Remove what a killed job left: what it was writing, deleting, or had replaced. One that was
    replaced by nothing gets its name back. Not a collective."""
    for left in folder.glob(f"{REPLACED}*"):
        final = folder / left.name.removeprefix(REPLACED)
        if final.exists():
            shutil.rmtree(left)
        else:
            os.rename(left, final)
    for left in (*folder.glob(f"{TEMPORARY}*"), *folder.glob(f"{REMOVED}*")):
        shutil.rmtree(left) if left.is_dir() else left.unlink()
