"""Read a file, folder or hub data set into a table of examples; find file and line of an example.

Hugging Face ``datasets`` reads all kinds of files. It keeps the table in an Arrow file on disk, so
memory does not grow with the data.
"""

import glob
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets

from sparse_lora_dist.data.line_numbers import (
    CELLS,
    broken_line,
    example_lines,
    first_cells,
    has_content,
)
from sparse_lora_dist.errors import UserError

BUILDERS = {
    ".jsonl": "json",
    ".json": "json",
    ".parquet": "parquet",
    ".txt": "text",
    ".csv": "csv",
    ".tsv": "csv",
}
KINDS = " ".join(BUILDERS)

Columns = Sequence[str]
"""Names of the columns of a table without a header line; empty for a table with one."""


@dataclass(frozen=True, kw_only=True)
class Examples:
    """The examples of one file, folder or hub data set, unchanged and in its order."""

    table: datasets.Dataset
    """One row for each example."""
    source: str
    """File, folder or id of a Hugging Face hub data set, as the user gave it."""
    files: tuple[Path, ...]
    """Paths of the files that hold the examples, in reading order; empty if they are not on this
    machine."""
    column_names: Columns = ()
    """Names of the columns of a table without a header line; empty for other data."""

    @property
    def is_plain_text(self) -> bool:
        """True if each example is the whole text of a ``.txt`` file, in a column ``text``."""
        return bool(self.files) and self.files[0].suffix == ".txt"

    def fault(self, index: int, what: str) -> UserError:
        """Return the error to raise for a wrong example, with its file and line. The files are read
        again to find them.

        Args:
            index: number of the example: its row in ``table``, from 0.
            what: sentence that says what is wrong with the example. If one of the files has a
                broken line (see ``broken_line``), the error names that line instead.
        """
        # JSON readers accept some broken lines, and return missing or extra examples for them.
        problem = next(filter(None, map(broken_line, self.files)), None)
        return UserError(problem or f"{self.place(index)}: {what}")

    def place(self, index: int) -> str:
        """Return a text that says where an example is: "file:line" for JSON Lines, otherwise "file,
        example n" with n counted from 1.

        Args:
            index: number of the example: its row in ``table``, from 0.
        """
        for file in self.files:
            lines = example_lines(file)
            count = _count(file, self.column_names) if lines is None else len(lines)
            if index < count:
                return f"{file}:{lines[index]}" if lines else f"{file}, example {index + 1}"
            index -= count
        return f"{self.source}, example {index + 1}"


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
    path = Path(source).expanduser()
    place = f"{flag} {source}"
    if path.is_file():
        table, files = _read_file(path, place, column_names)
    elif path.is_dir():
        table, files = _read_folder(path, split, place, column_names)
    elif path.suffix in BUILDERS or source.startswith((".", "~", "/")) or source.count("/") > 1:
        raise UserError(f"{place} does not exist. Give the path of a file or folder, or a hub id.")
    else:
        place += " is no file or folder on this machine, and as a hub data set it"
        table, files = _build(source, split, (), place, {})
    if max_samples is not None:
        table = table.select(range(min(max_samples, len(table))))
    return Examples(table=table, source=source, files=files, column_names=column_names)


def be_quiet() -> None:
    """Switch off the progress bars and the log of the package ``datasets`` in this process. Called
    on all ranks but rank 0, so that they are printed once."""
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)


Read = tuple[datasets.Dataset, tuple[Path, ...]]
"""A table, and the paths of the local files it was read from."""


def _read_file(path: Path, place: str, column_names: Columns) -> Read:
    if path.suffix not in BUILDERS:
        raise UserError(
            f"{place} is a file of an unknown kind: {path.suffix or 'it has no suffix'}. Give a "
            f"file of one of these kinds: {KINDS}."
        )
    # Checked here, as each reader fails in its own words at a file without columns.
    if not has_content(path):
        raise UserError(f"{place} is an empty file. Give a file with at least one example.")
    options = _file_options(path, column_names)
    return _build(BUILDERS[path.suffix], "train", (path,), place, options)


def _read_folder(folder: Path, split: str, place: str, column_names: Columns) -> Read:
    files = sorted(p for p in folder.rglob("*") if p.suffix in BUILDERS and has_content(p))
    kinds = sorted({p.suffix for p in files})
    if not files:
        raise UserError(
            f"{place} is a folder without data files. Give a folder with files of one of these "
            f"kinds: {KINDS}."
        )
    if len(kinds) == 1:
        options = _reader_options(files, column_names)
        return _build(str(folder), split, tuple(files), place, options)
    # A README makes it a folder like a hub data set: its metadata says which files are the data.
    if (folder / "README.md").is_file():
        return _build(str(folder), split, tuple(files), place, {})
    raise UserError(
        f"{place} is a folder with files of several kinds: {', '.join(kinds)}. Leave files of "
        "one kind in it, or give a single file."
    )


def _build(
    name: str, split: str, suspects: tuple[Path, ...], place: str, options: dict[str, Any]
) -> Read:
    """Read a table with ``datasets.load_dataset_builder``.

    Args:
        name: first argument of that function: a value of ``BUILDERS``, a folder, or a hub id.
        split: split to read, e.g. "train".
        suspects: files that are searched for a broken line if reading fails.
        place: text with which a message begins, e.g. "--data x.jsonl".
        options: keyword arguments of that function.

    Returns:
        The table, and the paths of the local files that it was read from.

    Raises:
        UserError: reading failed; the message names the first broken line of ``suspects`` if there
            is one.
    """
    try:
        with _silent_log():
            builder = datasets.load_dataset_builder(name, **options)
            builder.download_and_prepare()
        part = builder.info.splits.get(split)
        if part is not None and part.num_examples == 0:
            raise ValueError("It is empty. Give data with at least one example.")
        table = builder.as_dataset(split=split)
    except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        problem = next(filter(None, map(broken_line, suspects)), None)
        raise UserError(problem or f"{place} cannot be read. {_root(error)}") from error
    names = (builder.config.data_files or {}).get(split, [])
    return table, tuple(Path(name) for name in names if Path(name).is_file())


def _count(file: Path, column_names: Columns) -> int:
    """Return the number of examples in a file that is not JSON Lines."""
    options = _file_options(file, column_names)
    return len(_build(BUILDERS[file.suffix], "train", (), str(file), options)[0])


def _file_options(file: Path, column_names: Columns) -> dict[str, Any]:
    # escape: names with [brackets] would be taken for glob patterns.
    return {"data_files": [glob.escape(str(file))], **_reader_options([file], column_names)}


def _reader_options(files: list[Path], column_names: Columns) -> dict[str, Any]:
    if files[0].suffix == ".txt":
        return {"sample_by": "document"}
    if files[0].suffix in CELLS:
        return _table_options(files, column_names)
    return {}


def _table_options(files: list[Path], column_names: Columns) -> dict[str, Any]:
    # Checked before reading: pandas takes extra cells for an index and shifts the columns.
    problem = next(filter(None, map(broken_line, files)), None)
    if problem is not None:
        raise UserError(problem)
    # Everything stays text: an answer "42" is not a number, and "NA" is not a missing value.
    text = datasets.Value("string")
    first = first_cells(files[0])
    if column_names and len(column_names) != len(first):
        raise UserError(
            f"The first line of {files[0]} has {len(first)} cells, but --column_names has "
            f"{len(column_names)} names. Give one name for each cell."
        )
    features = datasets.Features(dict.fromkeys(column_names or first, text))
    names = {"names": list(column_names)} if column_names else {}
    return {"features": features, "keep_default_na": False, **names, **CELLS[files[0].suffix]}


@contextmanager
def _silent_log() -> Iterator[None]:
    """Context manager: silence the log of ``datasets``, which logs each error before raising it."""
    before = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(before)


def _root(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error).strip() or type(error).__name__
