"""Write folders atomically, and clean up after processes that were killed while doing so.

A folder is written under a random name beside its final one (``.tmp_NAME.HEX``), synced to disk and
renamed. An old folder is renamed aside first (``.replaced_NAME.HEX``), and its files are removed
after the new folder has its name. Two kinds of folders cannot be renamed and are filled file by
file instead: mount points, and folders that hold files of somebody else, which stay.
"""

import errno
import os
import re
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from stat import S_IMODE, S_IRWXU

from sparse_lora_dist.system.atomic_files import TEMPORARY, beside, sync, sync_all
from sparse_lora_dist.system.own_files import (
    HALF_MARKER,
    MARKER,
    Marker,
    contents_of,
    foreign_in,
    in_short,
    is_listed,
    read_marker,
    remove_own,
    write_marker,
)
from sparse_lora_dist.system.processes import Process, is_gone, this_process

REPLACED = ".replaced_"
"""Name prefix of an old folder that is kept until the new one has its name."""
EXPORT, UNFINISHED = "export", "unfinished"
"""Kinds of markers: of a folder of results that is complete, and of one that is being written."""
ABANDONED_S = 24 * 3600.0
"""Seconds after which an unfinished folder in which nothing was changed counts as abandoned, if the
process that wrote it cannot be seen from this host."""

IsOwn = Callable[[str], bool]


def is_mount_point(folder: Path) -> bool:
    """Return True if something is mounted at ``folder``, which then cannot be renamed. A file may
    be a mount point too.

    Unlike ``os.path.ismount`` this also finds bind mounts, on Linux.
    """
    try:
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return os.path.ismount(folder)
    escaped = re.compile(r"\\([0-7]{3})")
    mounts = {escaped.sub(lambda m: chr(int(m[1], 8)), line.split(" ")[4]) for line in lines}
    return str(folder.resolve()) in mounts


def is_filled_in_place(final: Path) -> bool:
    """Return True if a folder cannot be replaced by renaming: it is a mount point or the working
    directory, or the folder around it is not writable."""
    return final.is_dir() and (
        is_mount_point(final) or _is_here(final) or not os.access(final.parent, os.W_OK)
    )


def _is_here(folder: Path) -> bool:
    try:
        return folder.samefile(os.curdir)
    except OSError:  # a working directory that was removed
        return False


def new_folder(final: Path) -> Path:
    """Create a temporary folder in which the content of ``final`` is written, and return its path.

    It is beside ``final``, or in it if ``final`` cannot be renamed. Its marker names this process,
    so that a later process can tell that it was abandoned. If the marker cannot be written, as on a
    full disk, the folder is removed again.

    Raises:
        OSError: the folder or its marker cannot be written.
    """
    place = final / final.name if is_filled_in_place(final) else final
    place.parent.mkdir(parents=True, exist_ok=True)
    temporary = beside(place)
    temporary.mkdir()
    if final.is_dir():
        _share_alike(temporary, final.stat())
    try:
        write_marker(temporary, Marker(kind=UNFINISHED, about={"process": asdict(this_process())}))
    except BaseException:
        temporary.rmdir()
        raise
    return temporary


def _share_alike(folder: Path, there: os.stat_result) -> None:
    """Give a folder the group and permissions of the one that it is to replace, before files are
    made in it."""
    with suppress(OSError):  # the group of somebody else
        os.chown(folder, -1, there.st_gid)
    folder.chmod(S_IMODE(there.st_mode) | S_IRWXU)


def replace_whole(
    folder: Path, write: Callable[[Path], int], warn: Callable[[str], None] = lambda text: None
) -> int:
    """Create or replace a folder in one step.

    If ``write`` raises an exception, the old folder stays as it is. If ``folder`` is a symbolic
    link, the link stays and the folder that it leads to is replaced.

    Args:
        folder: the final path.
        write: function that writes files, but no folders, into the folder at the path passed to
            it, and returns their size in bytes.
        warn: function that is called with a sentence for each thing that killed processes left,
            and with one if files of the old folder cannot be removed.

    Returns:
        Size in bytes, as returned by ``write``.

    Raises:
        OSError: writing failed, or ``folder`` holds files of somebody else whose names are needed.
    """
    final = folder.resolve()
    said = clean_up(final)
    temporary = new_folder(final)
    try:
        size = write(temporary)
        said += finish(temporary, final)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    for text in said:
        warn(text)
    return size


def finish(temporary: Path, final: Path, *, replaces: bool = True) -> list[str]:
    """Give a folder from ``new_folder``, whose files are complete, its final path.

    Its marker then lists its files. Files of an earlier folder are removed if the marker there
    lists them.

    Args:
        temporary: the folder that ``new_folder`` returned.
        final: the path that was given to ``new_folder``.
        replaces: False if the folder at ``final`` must be missing or empty, also if another process
            has written it meanwhile.

    Returns:
        A sentence if files of the old folder cannot be removed; an empty list otherwise.

    Raises:
        OSError: the folder cannot be put there.
    """
    names, unfinished = contents_of(temporary), read_marker(temporary)
    assert unfinished is not None, "new_folder has written it"
    write_marker(temporary, replace(unfinished, names=names))
    sync_all(temporary)
    said = put_in_place(temporary, final, own_names(final) if replaces else lambda name: False)
    write_marker(final, Marker(kind=EXPORT, names=names))
    return said


def own_names(folder: Path) -> IsOwn:
    """Return a function that takes the name of an entry of ``folder``, and returns True if the
    marker there says that the program has written that file."""
    return is_listed(folder, read_marker(folder) or Marker(kind=EXPORT))


def put_in_place(temporary: Path, final: Path, is_own: IsOwn) -> list[str]:
    """Rename a complete folder to its final path, and remove the files of one that is there.

    Args:
        temporary: path of the complete folder, already synced to disk (``sync_all``).
        final: the path to rename it to. If it is a link, the link is replaced.
        is_own: function that takes the name of an entry of the old folder, and returns True if the
            program has written that file. All other entries stay.

    Returns:
        A sentence if files of the old folder cannot be removed; an empty list otherwise. A later
        ``clean_up`` tries again.

    Raises:
        OSError: the rename failed. An existing ``final`` is still there under its name.
    """
    if final.is_symlink():
        final.unlink()
    if not final.exists():
        os.rename(temporary, final)
        sync(final.parent)
    elif is_filled_in_place(final) or foreign_in(final, _or(is_own, temporary.name)):
        _fill(temporary, final, is_own)
    else:
        return _swap(temporary, final, is_own)
    return []


def _or(is_own: IsOwn, other: str) -> IsOwn:
    return lambda name: name == other or is_own(name)


def _swap(temporary: Path, final: Path, is_own: IsOwn) -> list[str]:
    replaced = beside(final, REPLACED)
    own = {path.name for path in final.iterdir() if is_own(path.name)}
    try:
        os.rename(final, replaced)
        os.rename(temporary, final)
    except BaseException as error:  # Ctrl-C between the two as well
        if not final.exists():
            os.rename(replaced, final)
        elif isinstance(error, OSError) and error.errno in (errno.EBUSY, errno.EXDEV):
            _fill(temporary, final, is_own)  # something is mounted there
            return []
        raise
    sync(final.parent)
    left = remove_own(replaced, own.__contains__)
    return [] if left is None else [f"{left}. The new folder {final} is whole"]


def _fill(temporary: Path, final: Path, is_own: IsOwn) -> None:
    """Move the files of ``temporary`` into the folder ``final``, and remove the program's other
    files there. A crash in the middle leaves a marker that lists old and new files."""
    new = sorted(path.name for path in temporary.iterdir() if path.name != MARKER)
    there = [path.name for path in final.iterdir() if path.name != temporary.name]
    own = {name for name in there if is_own(name)}
    if clash := sorted(set(new) & set(there) - own):
        raise FileExistsError(
            errno.EEXIST,
            f"it holds {in_short(clash)}, which this program did not write",
            str(final),
        )
    marked = read_marker(temporary)
    if marked is not None:
        write_marker(final, Marker(kind=EXPORT, names=dict.fromkeys([*own, *new])))
    for name in new:
        _move(temporary / name, final / name)
    for name in own - {*new, MARKER}:
        (final / name).unlink()
    if marked is not None:
        _move(temporary / MARKER, final / MARKER)
    sync(final)


def _move(file: Path, target: Path) -> None:
    try:
        os.replace(file, target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        copy = beside(target)
        shutil.copyfile(file, copy)
        sync(copy)
        os.replace(copy, target)


def clean_up(final: Path) -> list[str]:
    """Remove what killed processes left while they wrote ``final``, and give an old folder its name
    back if it has lost it between the two renames of a replacement.

    Only folders with the program's marker are touched, and none that a live process writes.

    Args:
        final: final path of the folder.

    Returns:
        A sentence for each thing that was done, or could not be done.
    """
    name = re.escape(os.fsdecode(os.fsencode(final.name)[:200]))
    said = []
    for half in final.iterdir() if final.is_dir() else ():
        if HALF_MARKER.fullmatch(half.name):
            half.unlink(missing_ok=True)
    for folder in (final.parent, final):
        for path in _matching(folder, rf"{re.escape(REPLACED)}{name}\.[0-9a-f]{{16}}"):
            said += _clean_replaced(path, final)
        for path in _matching(folder, rf"{re.escape(TEMPORARY)}{name}\.[0-9a-f]{{16}}"):
            said += _clean_unfinished(path)
    said += [
        f"{path} was left by an export of an earlier version that was killed. It is not removed, "
        "since it does not say whether its process has ended. Remove it by hand"
        for path in _matching(final.parent, rf"{re.escape(TEMPORARY)}{name}-\d+")
    ]
    return said


def _matching(folder: Path, pattern: str) -> list[Path]:
    if not folder.is_dir():
        return []
    found = (path for path in folder.iterdir() if re.fullmatch(pattern, path.name))
    return sorted(path for path in found if path.is_dir() and not path.is_symlink())


def _clean_replaced(path: Path, final: Path) -> list[str]:
    marker = read_marker(path)
    if marker is None:
        if not any(path.iterdir()):  # killed before its last operation
            path.rmdir()
        return []
    if not final.exists():
        os.rename(path, final)
        return [f"{final} has its name back: a process was killed while it replaced this folder"]
    left = remove_own(path, is_listed(path, marker))
    return [] if left is None else [left]


def _clean_unfinished(path: Path) -> list[str]:
    marker = read_marker(path)
    if marker is None:
        # Killed before it wrote the marker.
        remove_own(path, lambda name: HALF_MARKER.fullmatch(name) is not None)
        return []
    if marker.kind != UNFINISHED or not _is_abandoned(path, marker):
        return []
    shutil.rmtree(path, ignore_errors=True)
    left = " could not be removed: it" if path.exists() else " was removed: it"
    return [f"{path}{left} was left by a process that was killed while it wrote this folder"]


def _is_abandoned(path: Path, marker: Marker) -> bool:
    try:
        if is_gone(Process(**marker.about["process"])):
            return True
    except (KeyError, TypeError):
        pass
    newest = max(p.lstat().st_mtime for p in (path, *path.iterdir()))
    return time.time() - newest > ABANDONED_S
