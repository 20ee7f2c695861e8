"""Folders and files that are whole, or not there: written under another name, which is changed when
all of it is on disk."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

TEMPORARY, REPLACED = ".tmp_", ".replaced_"
"""Before the name: what is being written, and what is about to be replaced by that."""


def put_in_place(temporary: Path, final: Path) -> None:
    """Give ``temporary``, whose files are on disk, its name. What had the name is gone only once
    this one has it.

    Raises:
        OSError: it could not be; what had the name still has it.
    """
    replaced = final.with_name(f"{REPLACED}{final.name}")
    if final.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        os.rename(final, replaced)
    try:
        os.rename(temporary, final)
    except OSError:
        if replaced.exists():
            os.rename(replaced, final)
        raise
    sync(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def replace_whole(folder: Path, write: Callable[[Path], int]) -> int:
    """What ``write`` makes of an empty place beside ``folder``, on the disk, in the name of
    ``folder``; what it returned."""
    temporary = folder.with_name(f"{TEMPORARY}{folder.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    size = write(temporary)
    sync_all(temporary)
    put_in_place(temporary, folder)
    return size


def write_whole(path: Path, text: str) -> None:
    """The file with this text, or what was there before."""
    temporary = path.with_name(f"{TEMPORARY}{path.name}")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def sync_all(folder: Path) -> None:
    """Have the disk take every file of it, and their names."""
    for path in (*folder.rglob("*"), folder):
        sync(path)


def sync(path: Path) -> None:
    """Have the disk take it, or a crash after a rename could leave a name without its bytes."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
