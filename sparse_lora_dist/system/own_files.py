"""Tell the files that this program has written from all others, and remove only the former.

A folder of the program holds a marker, the file ``.sparse_lora_dist.json``:

    {"kind": "export", "names": {"README.md": [812, "9f0c..."]}, "about": {}}

``kind`` says what the folder is. ``names`` lists what the program has written in it, each with its
size and sha256 hash, or null where the program itself changes the entry later on. A file that is
not listed, or whose content is another one now, is somebody else's.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from sparse_lora_dist.system.atomic_files import write_whole

MARKER = ".sparse_lora_dist.json"
HALF_MARKER = re.compile(rf"\.tmp_{re.escape(MARKER)}\.[0-9a-f]{{16}}")
"""Name of a marker that a killed process was writing."""
HASHED_BYTES = 2**26
"""Largest file that is hashed. A larger one is compared by its size alone, as hashing 140 GB would
take minutes."""

Content = tuple[int, str | None]
"""Size of a file in bytes, and its sha256 hash; None for a large file."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Marker:
    """Content of a marker: what a folder is, and which of its entries the program has written."""

    kind: str
    """What the folder is: "run", "export", or "unfinished" while it is being written."""
    names: Mapping[str, Content | None] = field(default_factory=dict)
    """Name of an entry -> its content; None if the program may change the entry later."""
    about: Mapping[str, Any] = field(default_factory=dict)
    """Further JSON values by name, which depend on the kind."""


def read_marker(folder: Path) -> Marker | None:
    """Return the marker of a folder; None if it has none, or one that cannot be read."""
    path = folder / MARKER
    try:
        if path.is_symlink() or not path.is_file():
            return None
        fields = json.loads(path.read_text(encoding="utf-8-sig"))
        names = {n: None if c is None else (int(c[0]), c[1]) for n, c in fields["names"].items()}
        return Marker(kind=str(fields["kind"]), names=names, about=dict(fields["about"]))
    # A size of 1e400 raises an ArithmeticError.
    except (OSError, ValueError, LookupError, ArithmeticError, TypeError, AttributeError):
        return None
    except RecursionError:
        return None


def write_marker(folder: Path, marker: Marker) -> None:
    """Write the marker of a folder, or replace it."""
    write_whole(folder / MARKER, json.dumps(asdict(marker), indent=1) + "\n")


def claim(folder: Path, *names: str) -> None:
    """List entries in the marker of a folder. Call it before they are created: a crash in between
    then leaves no file of the program that seems to be somebody else's.

    Does nothing in a folder without a marker.

    Args:
        folder: the folder.
        names: names of entries that the program is about to create in it.
    """
    marker = read_marker(folder)
    if marker is not None and not set(names) <= marker.names.keys():
        new = {**marker.names, **dict.fromkeys(names)}
        write_marker(folder, replace(marker, names=new))


def claimed(folder: Path) -> set[str]:
    """Return the names that the marker of a folder lists; an empty set without a marker."""
    marker = read_marker(folder)
    return set() if marker is None else {*marker.names}


def content_of(path: Path) -> Content:
    """Return the size of a file, and its hash unless the file is large."""
    size = path.stat().st_size
    if size > HASHED_BYTES:
        return size, None
    with path.open("rb") as file:
        return size, hashlib.file_digest(file, "sha256").hexdigest()


def contents_of(folder: Path) -> dict[str, Content]:
    """Return the name and content of each file in a folder, without the marker."""
    return {p.name: content_of(p) for p in sorted(folder.iterdir()) if p.name != MARKER}


def is_listed(folder: Path, marker: Marker) -> Callable[[str], bool]:
    """Return a function that takes the name of an entry of ``folder``, and returns True if the
    marker lists it and its content is the one that the program wrote."""

    def is_own(name: str) -> bool:
        path = folder / name
        if name == MARKER:
            return True
        if name not in marker.names or path.is_symlink() or path.is_dir():
            return False
        wanted = marker.names[name]
        return wanted is None or content_of(path) == wanted

    return is_own


def foreign_in(folder: Path, is_own: Callable[[str], bool]) -> list[str]:
    """Return the names of the entries of a folder that the program has not written, sorted.

    Args:
        folder: an existing folder.
        is_own: function that takes a name and returns True if the program has written that file.
    """
    return sorted(path.name for path in folder.iterdir() if not is_own(path.name))


def remove_own(
    folder: Path, is_own: Callable[[str], bool], *, keeps_folder: bool = False
) -> str | None:
    """Remove the files of a folder that the program has written, then the folder if it is empty.

    No error is raised, and no link is followed: if ``folder`` is a link, the link alone is removed.

    Args:
        folder: the folder; it need not exist.
        is_own: function that takes a name and returns True if the program has written that file.
        keeps_folder: True to remove its files only.

    Returns:
        None if all is removed; otherwise a text that says what is left, and why.
    """
    try:
        if folder.is_symlink():
            folder.unlink()
        elif folder.exists():
            own = sorted(p.name for p in folder.iterdir() if is_own(p.name))
            for name in sorted(own, key=MARKER.__eq__):  # the marker last: it tells whose they are
                (folder / name).unlink()
            if foreign := foreign_in(folder, lambda name: False):
                return f"{folder} stays: it holds {in_short(foreign)}, not written by this program"
            if not keeps_folder:
                folder.rmdir()
    except OSError as error:
        return f"{folder} cannot be removed: {error}"
    return None


def in_short(names: Iterable[str]) -> str:
    """Return names as text for a message: the first three, and how many more there are."""
    found = list(names)
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    return ", ".join(map(ascii_name, found[:3])) + more


def ascii_name(name: str) -> str:
    """Return a file name as text that fits on one line: quoted and escaped if it has other than
    printable characters."""
    return name if name.isprintable() else ascii(name)
