"""Find the line numbers of the examples in a file, and its first broken line, for error messages.

A broken line is one that is not UTF-8 text, is not valid JSON in a JSON file, or has another number
of cells than the first line in a table.
"""

import csv
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

JSON = (".jsonl", ".json")
CELLS: dict[str, dict[str, Any]] = {
    ".csv": {},
    # Cells of a TSV hold no tabs, so nothing needs quotes, and one in a sentence is only a letter.
    ".tsv": {"delimiter": "\t", "quoting": csv.QUOTE_NONE},
}
"""Dict from the suffix of a table's file to keyword arguments for reading it, which are the same
for Python's csv module and for pandas."""
LARGEST_CELL = 2**31 - 1
"""Most characters of a cell of a table. A long document has more than the default of Python's csv
module, 131,072."""


def has_content(file: Path) -> bool:
    """Return True if the file has anything but white space."""
    with file.open("rb") as f:
        return any(line.strip() for line in f)


def example_lines(file: Path) -> list[int] | None:
    """Return the line number, counted from 1, of each example in a JSON Lines file. Return None for
    other kinds of files. Whether a ``.json`` file is JSON Lines is found from its first line."""
    if file.suffix not in JSON:
        return None
    with file.open("rb") as f:
        lines = [(number, line) for number, line in enumerate(f, start=1) if line.strip()]
    # A .json file may be one list, or one object over many lines: then line 1 is no object.
    if file.suffix == ".json" and _json_problem(file, 1, lines[0][1], allowed=dict) is not None:
        return None
    return [number for number, _ in lines]


def broken_line(file: Path) -> str | None:
    """Return a message "file:line: problem" for the first broken line of a JSON, JSON Lines, CSV or
    TSV file. Return None if no line is broken, or for other kinds of files."""
    if file.suffix in CELLS:
        return _broken_table(file)
    if file.suffix not in JSON:
        return None
    if example_lines(file) is None:
        return _json_problem(file, 1, file.read_bytes(), allowed=(list, dict))
    with file.open("rb") as f:
        for number, line in enumerate(f, start=1):
            problem = _json_problem(file, number, line, allowed=dict) if line.strip() else None
            if problem is not None:
                return problem
    return None


def first_cells(file: Path) -> list[str]:
    """Return the cells of the first line of a CSV or TSV file, which are the names of its columns
    if it has a header line."""
    with _cells(file) as reader:
        return next(reader)


@contextmanager
def _cells(file: Path) -> Iterator[Any]:
    csv.field_size_limit(LARGEST_CELL)
    with file.open(newline="", encoding="utf-8-sig") as f:
        yield csv.reader(f, **CELLS[file.suffix])


def _broken_table(file: Path) -> str | None:
    remedy = " Put cells that contain commas in quotes." if file.suffix == ".csv" else ""
    with _cells(file) as reader:
        try:
            columns = next(reader)
            for cells in reader:
                if cells and len(cells) != len(columns):
                    found = f"This line has {len(cells)} cells, but the first has {len(columns)}."
                    return f"{file}:{reader.line_num}: {found}{remedy}"
        except (csv.Error, UnicodeDecodeError) as error:
            return (
                f"{file}:{reader.line_num + 1}: This line or one after it cannot be read: {error}. "
                "Correct the file, or save it as UTF-8 text."
            )
    return None


def _json_problem(
    file: Path, line: int, content: bytes, *, allowed: type | tuple[type, ...]
) -> str | None:
    try:
        value = json.loads(content.decode("utf-8-sig").rstrip())
    except UnicodeDecodeError as error:
        return f"{file}:{line}: This line is not UTF-8 text ({error.reason})."
    except json.JSONDecodeError as error:
        where = f"{file}:{line + error.lineno - 1}"
        return f"{where}: This line is not valid JSON: {error.msg} (column {error.colno})."
    if not isinstance(value, allowed):
        return (
            f"{file}:{line}: A JSON object {{...}} is needed, but this is {type(value).__name__}."
        )
    return None
