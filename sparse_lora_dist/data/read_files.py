"""Read a file, folder or hub data set into a table of examples.

Hugging Face ``datasets`` keeps the table in an Arrow file on disk, so memory does not grow with the
data. JSON, CSV, TSV and text files are read by ``local_files``, Parquet and the hub by
``datasets``.
"""

import glob
import logging
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet as parquet

from sparse_lora_dist.data.examples import (
    EMPTY,
    MOST_ROWS,
    Examples,
    declared_names,
    fingerprint,
    from_cache,
    local_names,
    local_table,
)
from sparse_lora_dist.data.folders import Folder, list_folder, of_split
from sparse_lora_dist.data.local_files import (
    CELLS,
    JSON,
    PARQUET,
    TEXT,
    Columns,
    class_names,
    has_content,
    refuse_repeated_names,
)
from sparse_lora_dist.errors import UserError, in_words
from sparse_lora_dist.system.machine_errors import in_plain_words
from sparse_lora_dist.system.small_files import refuse_nul_bytes, refuse_pointers

SUFFIXES = (*JSON, PARQUET, TEXT, *CELLS)
KINDS = " ".join(SUFFIXES)
CARD = "README.md"
"""File of a folder laid out like a hub data set."""


def read_examples(
    source: str,
    *,
    split: str,
    max_samples: int | None,
    flag: str,
    column_names: Columns = (),
) -> Examples:
    """Read a file, folder or hub data set into a table. Not a collective.

    Args:
        source: a file (.jsonl .json .parquet .txt .csv .tsv), a folder of files of one of these
            kinds, a folder laid out like a Hugging Face hub data set, or the id of such a data set.
        split: split of a folder or hub data set, e.g. "train". A single file has no splits.
        max_samples: number of examples to return, from the first on; None returns all.
        flag: the command-line flag whose value is ``source``, for messages.
        column_names: names of the columns of a CSV or TSV table without a header line; () for other
            data.

    Returns:
        The examples, with what is needed to name the file and line of a wrong one.

    Raises:
        UserError: the source does not exist, is of an unknown kind, has broken content (with file
            and line), or has no example.
    """
    with readable(f"{flag} {source}"):
        table, files, is_local, others = _read(source, split, f"{flag} {source}", column_names)
        names = local_names(table) if is_local else declared_names(table)
    if max_samples is not None:
        table = table.select(range(min(max_samples, len(table))))
    return Examples(
        table=table,
        is_local=is_local,
        names=names,
        source=source,
        files=files,
        unread_files=others,
    )


def be_quiet() -> None:
    """Switch off the progress bars and the log of the package ``datasets`` in this process. Called
    on all ranks but rank 0, so that they are printed once."""
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)


@contextmanager
def readable(place: str, cache: Path | None = None) -> Iterator[None]:
    """Context manager: turn whatever a library raises while data are read into a UserError of one
    sentence.

    Args:
        place: text with which the message begins, e.g. "--data x.jsonl".
        cache: folder of the cache of ``datasets`` if only tables in it are read; otherwise None.
    """
    try:
        with from_cache(cache) if cache is not None else nullcontext():
            yield
    except UserError:
        raise
    except Exception as error:
        causes: list[BaseException] = [error]
        while (cause := causes[-1].__cause__) is not None:
            causes.append(cause)
        for one in causes:
            if isinstance(one, UserError):
                raise one from None
        if (said := in_plain_words(error)) is not None:
            raise UserError(said) from error
        raise UserError(f"{place} cannot be read. {plainly(causes[-1])}{_advice(error)}") from error


def _advice(error: BaseException) -> str:
    if "Config name is missing" not in str(error):
        return ""
    return (
        " (There is no such option here: give the files or the folder of one configuration, after "
        "downloading them, or mark one in README.md with default: true.)"
    )


def cache_of(table: datasets.Dataset) -> Path:
    """Return the folder in which ``table`` is cached, and tables that are made from it."""
    files = [Path(file["filename"]) for file in table.cache_files]
    return files[0].parent if files else Path(datasets.config.HF_DATASETS_CACHE)


def plainly(error: BaseException) -> str:
    """Return the type and text of an exception of a library; only the text of an OSError or
    ValueError, which says enough."""
    is_plain = type(error) in (ValueError, FileNotFoundError, PermissionError) and str(error)
    return " ".join(str(error).split()) if is_plain else in_words(error)


FromFiles = tuple[datasets.Dataset, tuple[Path, ...], bool, tuple[str, ...]]
"""A table, the paths of the local files it was read from, True if it has the columns ``LOCAL``, and
the paths of the other files of the folder."""


def _read(source: str, split: str, place: str, column_names: Columns) -> FromFiles:
    if not source.strip():  # as a path it would be the current folder
        raise UserError(f"{place} is empty. Give the path of a file or folder, or a hub id.")
    path = Path(source).expanduser()
    if path.is_file():
        _check_file(path, place)
        folder = Folder(path=path.parent, files=(path,), others=())
        return _read_files(folder, place, column_names)
    if path.is_dir():
        return _read_folder(path, split, place, column_names)
    if path.exists():
        raise UserError(
            f"{place} is a pipe or a device, but data are read several times. Give a file or a "
            "folder: write what comes through the pipe into a file first."
        )
    if path.suffix in SUFFIXES or source.startswith((".", "~", "/")) or source.count("/") > 1:
        raise UserError(f"{place} does not exist. Give the path of a file or folder, or a hub id.")
    place += " is no file or folder on this machine, and as a hub data set it"
    return *_build(lambda: datasets.load_dataset_builder(source), split, place), False, ()


def _check_file(path: Path, place: str) -> None:
    if path.suffix not in SUFFIXES:
        raise UserError(
            f"{place} is a file of an unknown kind: {path.suffix or 'it has no suffix'}. Give a "
            f"file of one of these kinds: {KINDS}."
        )
    if not has_content(path):
        raise UserError(f"{place} is an empty file. Give a file with at least one example.")


def _read_files(folder: Folder, place: str, column_names: Columns) -> FromFiles:
    """Read all files of ``folder``, which are of one kind."""
    refuse_pointers(*folder.files)
    others = folder.relative(folder.others)
    for file in folder.files if folder.kinds == [PARQUET] else ():
        refuse_repeated_names(file, parquet.read_schema(file).names)
    if folder.kinds == [PARQUET] and _is_one_table(folder.files):
        return *_read_parquet(folder.files, place), False, others
    with _silent_log():
        table = local_table(folder.files, column_names)
    return table, folder.files, True, others


def _read_folder(path: Path, split: str, place: str, column_names: Columns) -> FromFiles:
    folder = list_folder(path, SUFFIXES)
    card = _front_matter(path / CARD)
    if not folder.files:
        raise UserError(
            f"{place} is a folder without data files. Give a folder with files of one of these "
            f"kinds: {KINDS}."
        )
    # The metadata of a hub data set may say which files are the data.
    if card is not None and (len(folder.kinds) > 1 or CONFIGS.search(card)):
        return _read_hub_folder(folder, split, place)
    if len(folder.kinds) > 1:
        raise UserError(
            f"{place} is a folder with files of several kinds: {', '.join(folder.kinds)}. Leave "
            "files of one kind in it, or give a single file."
        )
    return _read_files(of_split(folder, split, place), place, column_names)


CONFIGS = re.compile(r"""^["']?configs["']?\s*:""", re.MULTILINE)
"""Matches the key of a README.md's metadata that says which files are the data."""


def _front_matter(card: Path) -> str | None:
    """Return the YAML at the top of a README.md; None if there is no such file."""
    if not card.is_file():
        return None
    # As huggingface_hub finds it; a card in another encoding may have none.
    text = card.read_bytes().decode("utf-8-sig", errors="replace")
    found = re.match(r"\s*---[\r\n]+(.*?)[\r\n]+---(?:[\r\n]|$)", text, re.DOTALL)
    return found[1] if found else ""


def _read_hub_folder(folder: Folder, split: str, place: str) -> FromFiles:
    def builder() -> Any:
        made = datasets.load_dataset_builder(str(folder.path), cache_dir=_cache(folder.files))
        named = [name for names in (made.config.data_files or {}).values() for name in names]
        for name in filter(os.path.isabs, named):
            if os.path.relpath(name, folder.path).split(os.sep)[0] == os.pardir:
                raise UserError(
                    f"{place}: its {CARD} names {name}, which is not in this folder. Remove it "
                    f"from {CARD}, or give that file."
                )
        refuse_pointers(*map(Path, named))
        for name in filter(os.path.isfile, named):
            if name.endswith((TEXT, *CELLS)):
                refuse_nul_bytes(Path(name))
        return made

    table, files = _build(builder, split, place)
    read = {os.path.abspath(file) for file in files}
    all_files = (*folder.files, *folder.others)
    others = tuple(file for file in all_files if os.path.abspath(file) not in read)
    return table, files, False, folder.relative(tuple(sorted(others)))


def _is_one_table(files: tuple[Path, ...]) -> bool:
    """Return True if the schemas of Parquet files are the same, with the same names of classes, and
    ``datasets`` has all types in it: a map, for example, it has not."""
    first, *others = (parquet.read_schema(file) for file in files)
    try:
        datasets.Features.from_arrow_schema(first)
    except ValueError:
        return False
    names = class_names(first)
    return all(first.equals(other) and class_names(other) == names for other in others)


def _read_parquet(files: tuple[Path, ...], place: str) -> tuple[datasets.Dataset, tuple[Path, ...]]:
    def builder() -> Any:
        return datasets.load_dataset_builder(
            "parquet",
            data_files=[glob.escape(str(file)) for file in files],  # a name may have [brackets]
            batch_size=MOST_ROWS,  # without it, the rows of the first group, which may have none
            cache_dir=_cache(files),
        )

    return _build(builder, "train", place)[0], files


def _cache(files: tuple[Path, ...]) -> str:
    """Return the folder in which ``datasets`` caches the tables of some files. Its own key knows
    the dates of files only, but not their content."""
    return str(Path(datasets.config.HF_DATASETS_CACHE) / "sparse_lora_dist" / fingerprint(files))


def _build(
    builder_of: Callable[[], Any], split: str, place: str
) -> tuple[datasets.Dataset, tuple[Path, ...]]:
    """Read a table with a builder of ``datasets``.

    Args:
        builder_of: function that returns the builder.
        split: split to read, e.g. "train".
        place: text with which a message begins, e.g. "--data x.parquet".

    Returns:
        The table, and the paths of the local files that it was read from.

    Raises:
        UserError: reading failed.
    """
    with readable(place):
        with _silent_log():
            builder = builder_of()
            builder.download_and_prepare()
        part = builder.info.splits.get(split)
        if part is not None and part.num_examples == 0:
            raise ValueError(EMPTY)
        # A split that the data do not have is no fault of the cache.
        with from_cache(builder.cache_dir) if part is not None else nullcontext():
            table = _not_decoded(builder.as_dataset(split=split))
    names = (builder.config.data_files or {}).get(split, [])
    return table, tuple(Path(name) for name in names if Path(name).is_file())


def _not_decoded(table: datasets.Dataset) -> datasets.Dataset:
    """Return a table whose images, sounds and the like stay bytes: none is read, and one that is
    damaged, or needs another package, could not be decoded."""
    for name, feature in table.features.items():
        if getattr(feature, "decode", False):
            table = table.cast_column(name, replace(feature, decode=False))
    return table


@contextmanager
def _silent_log() -> Iterator[None]:
    """Context manager: silence the log of ``datasets``, which logs each error before raising it."""
    before = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(before)
