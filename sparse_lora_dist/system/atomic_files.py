"""Write files and folders atomically: they appear complete or not at all.

Content is written under a temporary name beside the final one, then renamed. Folders are synced to
disk before they are renamed. If the process crashes, the final name has either the old or the new
content. A folder can also be missing: after a crash between the two renames of ``put_in_place``,
the old folder is called ``.replaced_NAME`` and the new one still has its temporary name.
"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

TEMPORARY, REPLACED = ".tmp_", ".replaced_"
"""Name prefix of a file or folder that is being written, and name prefix of an old folder that is
kept until the new one has its name."""


def put_in_place(temporary: Path, final: Path) -> None:
    """Rename a complete folder to its final path, and replace a folder that is there.

    An existing ``final`` is renamed aside first and removed only after the new one has its name.

    Args:
        temporary: path of the complete folder, already synced to disk (``sync_all``). It must be on
            the same file system as ``final``.
        final: the path to rename it to.

    Raises:
        OSError: the rename failed. An existing ``final`` is still there under its name.
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
    """Create or replace a folder in one step.

    If ``write`` raises an exception, the old folder stays as it is.

    Args:
        folder: the final path.
        write: function that creates a folder at the path passed to it, which is a temporary one
            beside ``folder``, and returns the folder's size in bytes.

    Returns:
        Size in bytes, as returned by ``write``.
    """
    temporary = folder.with_name(f"{TEMPORARY}{folder.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    size = write(temporary)
    sync_all(temporary)
    put_in_place(temporary, folder)
    return size


def write_whole(path: Path, text: str) -> None:
    """Write ``text`` to the file ``path`` as UTF-8. If that fails, the file keeps its old content.

    The text is not synced to disk.
    """
    temporary = path.with_name(f"{TEMPORARY}{path.name}")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def sync_all(folder: Path) -> None:
    """Call fsync on every file and folder below ``folder``, and on ``folder`` itself."""
    for path in (*folder.rglob("*"), folder):
        sync(path)


def sync(path: Path) -> None:
    """Call fsync on a file or folder.

    Without it, a file that was renamed shortly before the machine crashed could have its final name
    but not its content.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
