"""Write files atomically: they appear complete or not at all.

Content is written under a random temporary name beside the final one, then renamed. The temporary
file is created exclusively (O_EXCL), so a link that somebody has put there is never followed. If
the process crashes, the final name has either the old or the new content. ``whole_folders.py`` does
the same for folders.
"""

import errno
import os
import secrets
from pathlib import Path

TEMPORARY = ".tmp_"
"""Name prefix of a file or folder that is being written."""
LONGEST_NAME = 200
"""Most bytes of a name that a temporary name repeats; file systems allow 255 for the whole."""

NOT_OFFERED = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS)
"""Errors of a file system that does not have what it is asked for, e.g. fsync of a folder."""


def beside(path: Path, prefix: str = TEMPORARY) -> Path:
    """Return a random path in the same folder: PREFIX, the name of ``path``, a dot, 16 hex digits.

    Args:
        path: the file or folder that the new name stands for.
        prefix: first part of the new name.
    """
    name = os.fsdecode(os.fsencode(path.name)[:LONGEST_NAME])
    return path.with_name(f"{prefix}{name}.{secrets.token_hex(8)}")


def create(path: Path, content: bytes) -> None:
    """Create a file that does not exist yet, with the permissions of the umask.

    Raises:
        FileExistsError: there is a file, folder or link of this name.
        OSError: writing failed; the file is removed again. The error names the file.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
    descriptor = os.open(path, flags, 0o666)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
    except BaseException as error:
        path.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)  # a write knows the number of the file alone
        raise


def write_whole(path: Path, content: str | bytes) -> None:
    """Write the file ``path``. If that fails, the file keeps its old content.

    A symbolic link of this name is replaced; what it leads to stays as it is. The content is not
    synced to disk.

    Args:
        path: the file.
        content: what it will hold; text is written as UTF-8.
    """
    temporary = beside(path)
    create(temporary, content if isinstance(content, bytes) else content.encode("utf-8"))
    try:
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_new(path: Path, content: str | bytes) -> None:
    """Write a file that does not exist yet, so that nobody ever sees half of it, and sync it.

    It is linked from a complete file. Where a file system has no links, it is created in place.

    Args:
        path: the file.
        content: what it will hold; text is written as UTF-8.

    Raises:
        FileExistsError: there is a file, folder or link of this name. It stays as it is.
        OSError: writing failed; nothing is left.
    """
    raw, temporary = content if isinstance(content, bytes) else content.encode(), beside(path)
    create(temporary, raw)
    try:
        sync(temporary)  # outside of what follows: Linux says only once that a page is lost
        try:
            os.link(temporary, path, follow_symlinks=False)
        except FileExistsError:
            raise
        except OSError:
            _create_in_place(path, raw)
    finally:
        temporary.unlink(missing_ok=True)


def _create_in_place(path: Path, content: bytes) -> None:
    create(path, content)
    try:
        sync(path)
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def sync_all(folder: Path) -> None:
    """Call fsync on every file and folder below ``folder``, and on ``folder`` itself."""
    for path in (*folder.rglob("*"), folder):
        sync(path)


def sync(path: Path) -> None:
    """Call fsync on a file or folder.

    Without it, a file that was renamed shortly before the machine crashed could have its final name
    but not its content. A folder on a file system that cannot sync folders is passed.

    Raises:
        OSError: storage failed. The error names the path.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NOT_OFFERED or not path.is_dir():
            error.filename = str(path)
            raise
    finally:
        os.close(descriptor)
