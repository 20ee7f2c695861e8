"""Choose the files of a folder that hold the examples of a split."""

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from sparse_lora_dist.data.local_files import has_content
from sparse_lora_dist.errors import UserError

SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""Split -> words that name it in a path, as in Hugging Face ``datasets``."""
SPLIT_OF = {word: split for split, words in SPLITS.items() for word in words}


SHARD = re.compile(r"(.*?)(\d{4,6})-of-(\d{4,6})(\D.*)?")
"""Name of a file that is one of several: what stands before its number, its number from 0 or 1 on,
how many there are, and what follows."""
HASH = re.compile(r"^-[0-9a-f]{16}(?=\.)")
MOST_SHARDS = 100_000
"""Largest such number of which the missing files are looked for."""
ABOUT = ("README.md", "LICENSE", "LICENSE.md")
"""Names of files that are about the data, and that nobody expects to be read."""


@dataclass(frozen=True, kw_only=True)
class Folder:
    """The files of a folder."""

    path: Path
    """Path of the folder."""
    files: tuple[Path, ...]
    """Files to read, sorted by path."""
    others: tuple[Path, ...]
    """All other files that are not hidden: of other kinds, without content, or of other splits.
    Those in ``ABOUT`` are left out."""

    @property
    def kinds(self) -> list[str]:
        """Sorted suffixes of ``files``."""
        return sorted({file.suffix for file in self.files})

    def relative(self, files: tuple[Path, ...]) -> tuple[str, ...]:
        """Return paths relative to the folder."""
        return tuple(str(file.relative_to(self.path)) for file in files)


def list_folder(path: Path, suffixes: tuple[str, ...]) -> Folder:
    """Return all files with content of some kinds in a folder and its sub-folders. Files and
    folders whose names begin with "." or "__" are hidden.

    Args:
        path: the folder.
        suffixes: the kinds, such as ".jsonl".

    Raises:
        UserError: something with one of the suffixes is no regular file, such as a pipe or a link
            that leads nowhere.
    """
    found = sorted(_walk(path))
    for file in found:
        if file.suffix in suffixes and not file.is_file():
            raise UserError(
                f"{file} is no regular file: a pipe, a device, or a link that leads nowhere. "
                "Replace it by a file, or remove it."
            )
    files = tuple(f for f in found if f.suffix in suffixes and has_content(f))
    is_read = set(files)
    others = (f for f in found if f not in is_read and f.name not in ABOUT)
    return Folder(path=path, files=files, others=tuple(others))


def of_split(folder: Folder, split: str, place: str) -> Folder:
    """Return a folder with the files of one split. If some file names no split, these are all of
    its files: a name such as ``support-test.jsonl`` says nothing then.

    Args:
        folder: folder with at least one file to read.
        split: "train", "validation" or "test".
        place: text with which a message begins, e.g. "--data folder".

    Raises:
        UserError: the names do not say which files are of the split.
    """
    splits = {file: split_of(file.relative_to(folder.path)) for file in folder.files}
    named = {name for name in splits.values() if name is not None}
    if None in splits.values():
        if len(named) > 1:
            raise UserError(_mixed(folder, splits, place))
        return folder
    if split not in named:
        raise UserError(
            f"{place} has no file of the split {split!r}, because the names of all its files name "
            f"another: {', '.join(sorted(named))} ({_some(folder, folder.files)}). Rename the "
            "files, or give a single file or another folder."
        )
    chosen = tuple(file for file, name in splits.items() if name == split)
    rest = tuple(file for file, name in splits.items() if name != split)
    return Folder(path=folder.path, files=chosen, others=tuple(sorted((*folder.others, *rest))))


def split_of(path: Path) -> str | None:
    """Return the split that the name of a file, or of a folder that it is in, has as a word, in
    letters of any case. Return None if there is none.

    Args:
        path: path relative to the folder of the data. The last part that names a split counts.
    """
    for part in reversed(path.parts):
        for word in re.split(r"[\W\d_]+", part.lower()):
            if word in SPLIT_OF:
                return SPLIT_OF[word]
    return None


def missing_shards(files: Iterable[Path]) -> list[str]:
    """Return the names of files that are missing beside others of the same set, as after a download
    that broke off: "a-00001-of-00002.jsonl" where only "a-00000-of-00002.jsonl" is there.

    Args:
        files: paths of the files that are read.
    """
    found: dict[tuple[Path, str, str, str], set[int]] = {}
    for file in files:
        if (parts := SHARD.fullmatch(file.name)) and int(parts[3]) <= MOST_SHARDS:
            # datasets once gave each shard a hash of its own.
            key = (file.parent, parts[1], parts[3], HASH.sub("", parts[4] or ""))
            found.setdefault(key, set()).add(int(parts[2]))
    return [
        f"{before}{number:0{len(total)}}-of-{total}{after}"
        for (_, before, total, after), there in found.items()
        for number in _numbers(int(total), there)
        if number not in there
    ]


def _numbers(total: int, there: set[int]) -> range:
    """Return the numbers of a set of files, which begin at 0, or at 1 as those of weights do."""
    return range(1, total + 1) if total in there else range(total)


def _mixed(folder: Folder, splits: dict[Path, str | None], place: str) -> str:
    named = {name for name in splits.values() if name is not None}
    other = tuple(file for file, name in splits.items() if name is None)
    return (
        f"{place} has files of the splits {', '.join(sorted(named))}, and others whose names have "
        f"no split: {_some(folder, other)}. Put the files of each split into a folder of their "
        "own, or give a single file."
    )


def _some(folder: Folder, files: tuple[Path, ...], most: int = 5) -> str:
    names = folder.relative(files)
    return ", ".join(names[:most]) + (f" and {len(names) - most:,} more" if names[most:] else "")


def _walk(path: Path) -> Iterator[Path]:
    seen: set[str] = set()
    for root, folders, names in os.walk(path, followlinks=True):
        here = os.path.realpath(root)
        folders[:] = [] if here in seen else [f for f in folders if not _is_hidden(f)]
        yield from (
            Path(root) / name for name in names if not _is_hidden(name) and here not in seen
        )
        seen.add(here)


def _is_hidden(name: str) -> bool:
    return name.startswith((".", "__"))
