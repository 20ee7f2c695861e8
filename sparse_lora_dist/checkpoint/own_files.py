"""Tell the files of checkpoints from other files, remove them, and move them aside.

A user may keep notes in a folder of the program, move a checkpoint to another disk, or rename it.
Only files with the names that this program writes are removed. What cannot be removed is a warning
and is tried again after the next save: tidying up never ends a run.
"""

import os
import re
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

from sparse_lora_dist.checkpoint.manifest import MANIFEST, read_manifest, step_of
from sparse_lora_dist.distributed.console import print_line
from sparse_lora_dist.errors import UserError
from sparse_lora_dist.system.atomic_files import TEMPORARY, beside
from sparse_lora_dist.system.own_files import foreign_in, in_short, remove_own
from sparse_lora_dist.system.whole_folders import REPLACED

REMOVED = ".removed_"
"""Prefix of the name of a checkpoint that is being deleted."""
LATEST = "latest"
"""Text file with the name of the newest checkpoint. It is for people: no code reads it, because
another node may still see an old one on a shared disk."""
SET_ASIDE = "set_aside_"
"""First part of the name of a folder that keeps the checkpoints of steps that a run went back
behind; a number follows."""
RANK_FILE = re.compile(r"rank_\d{5,}\.safetensors|\.tmp[0-9A-Za-z]{6}")
"""Name of a rank's file, and of the file in which safetensors begins to write it."""
LEFT = re.compile(
    rf"(?P<state>{TEMPORARY}|{REMOVED}|{REPLACED})(?P<step>step_\d{{8,}})(\.[0-9a-f]{{16}})?"
)
"""Name of a checkpoint that is being written, deleted or replaced. Versions before the folders had
a random part left it out."""
LEFT_LATEST = re.compile(rf"{TEMPORARY}{LATEST}(\.[0-9a-f]{{16}})?")

_warned: set[str] = set()


def may_be_own(name: str) -> bool:
    """Return True if a file of this name in the folder of a checkpoint may be one that is saved."""
    return name == MANIFEST or RANK_FILE.fullmatch(name) is not None


def own_files(path: Path) -> frozenset[str]:
    """Return the names of the files of a published checkpoint: the manifest, and those it lists.

    The result is empty if the manifest is damaged, or is of another step than the folder's name: it
    may then be somebody else's.
    """
    try:
        manifest = read_manifest(path)
        saved = manifest.get("progress", {}).get("step", step_of(path))
        names = {MANIFEST, *(file["name"] for file in manifest["files"])}
    except (UserError, OSError, AttributeError, KeyError, TypeError):
        return frozenset()
    return frozenset(names) if saved == step_of(path) else frozenset()


def remove(path: Path) -> None:
    """Delete a published checkpoint. Other files in its folder stay, and no error is raised.

    The folder is renamed first: if the job is killed, nothing is left that looks complete. If the
    folder is a link, the link alone is removed. A damaged checkpoint stays.
    """
    try:
        own = own_files(path)
        if path.is_symlink():
            path.unlink()
            print_line("removed", f"the link {path}; the checkpoint that it leads to stays")
        elif not own:
            return
        # NFS keeps a file that somebody reads under the name .nfs..., until he closes it.
        elif foreign_in(path, lambda name: name in own or name.startswith(".nfs")):
            (path / MANIFEST).unlink()
            _warn(remove_own(path, own.__contains__))
        else:
            _warn(remove_own(path.rename(beside(path, REMOVED)), own.__contains__))
    except OSError as error:
        _warn(f"{path} cannot be removed: {error}")


def remove_left(folder: Path) -> None:
    """Try again to delete what an earlier ``remove`` could not delete. No error is raised.

    Args:
        folder: the "checkpoints" folder of a run.
    """
    for path in list(folder.glob(f"{REMOVED}*")):
        if (match := LEFT.fullmatch(path.name)) and match["state"] == REMOVED:
            _warn(remove_own(path, may_be_own))


def clean(folder: Path) -> None:
    """Remove what a killed job left: half-written, half-deleted and replaced checkpoints.

    Called on one rank before a job goes on with a run. A checkpoint that was moved aside to be
    replaced gets its name back if its replacement is missing. No error is raised, and files with
    names that this program does not write stay. Not a collective.

    Args:
        folder: the "checkpoints" folder of a run.
    """
    for left in list(folder.glob(".*")):
        try:
            _clean(left)
        except OSError as error:
            _warn(f"{left} was left by a job that was killed, and cannot be removed: {error}")


def _clean(left: Path) -> None:
    match = LEFT.fullmatch(left.name)
    if match is None:
        if LEFT_LATEST.fullmatch(left.name) and _is_half_of_latest(left):
            left.unlink()
    elif left.is_symlink() and match["state"] == TEMPORARY:  # no job makes links
        pass
    elif match["state"] == REPLACED and not os.path.lexists(left.with_name(match["step"])):
        left.rename(left.with_name(match["step"]))
    elif left.is_dir():
        _warn(remove_own(left, may_be_own))


def _is_half_of_latest(path: Path) -> bool:
    if path.is_symlink() or not path.is_file() or path.stat().st_size > 64:
        return False
    return re.fullmatch(r"(step_\d*\n?)?", path.read_text(errors="replace")) is not None


def set_aside(steps: Sequence[Path], records: Iterable[Path]) -> Path:
    """Move published checkpoints into a new folder beside them, with copies of the run's records.

    Called on one rank, by a run that goes back to an earlier step, so that ``--resume auto`` does
    not take a later one.

    Args:
        steps: folders of checkpoints, all in one folder.
        records: files to copy, such as metrics.jsonl; those that do not exist are left out.

    Returns:
        The new folder.
    """
    folder = steps[0].parent
    number = 1
    while os.path.lexists(folder / f"{SET_ASIDE}{number}"):
        number += 1
    kept = folder / f"{SET_ASIDE}{number}"
    kept.mkdir()
    for file in records:
        if file.is_file():
            shutil.copyfile(file, kept / file.name)
    for step in sorted(steps, reverse=True):  # so that a job killed here leaves a run without gaps
        step.rename(kept / step.name)
    return kept


def in_words(steps: Iterable[Path]) -> str:
    """Return the names of checkpoints as text for a message."""
    return in_short(sorted(path.name for path in steps))


def _warn(problem: str | None) -> None:
    """Print a problem once in the life of this process: it is met again after each save."""
    if problem is not None and problem not in _warned:
        _warned.add(problem)
        print_line("warning", f"{problem}. This is tried again after the next save.")
