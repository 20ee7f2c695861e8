"""Read the examples of JSON, CSV, TSV, text and Parquet files one by one, with the line of each.

Each example is read by itself, so a column that is not used never decides whether a file can be
read: its values may be numbers in one example and text or missing in the next. Text stays text; a
date in quotes is text too.
"""

import csv
import json
import re
from codecs import BOM_UTF8
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as parquet

from sparse_lora_dist.errors import UserError
from sparse_lora_dist.system.small_files import refuse_nul_bytes, unique_keys

Columns = Sequence[str]
"""Names of the columns of a table without a header line; empty for a table with one."""
Numbered = Iterator[tuple[int, dict[str, Any], str]]
"""Examples of a file: the line number, counted from 1, a dict from column to value, and this dict
as JSON text. The line number is 0 where one line does not say where an example is."""

JSON = (".jsonl", ".json")
CELLS: dict[str, dict[str, Any]] = {
    ".csv": {"strict": True},  # a quote that is never closed would swallow the rows after it
    # Cells of a TSV hold no tabs, so nothing needs quotes, and one in a sentence is only a letter.
    ".tsv": {"delimiter": "\t", "quoting": csv.QUOTE_NONE},
}
"""Dict from the suffix of a table's file to keyword arguments of Python's csv module."""
MOST_DIGITS = 4000
QUOTED = re.compile(r'"(?:[^"]|"")*""(?:[^"]|"")*"')
"""A cell that is quoted as in CSV and has quotes inside, which are doubled. pandas writes it so in
TSV files too."""
TEXT, PARQUET = ".txt", ".parquet"
LARGEST_CELL = 2**31 - 1
"""Most characters of a cell of a table. A long document has more than the default of Python's csv
module, 131,072."""


def has_content(file: Path) -> bool:
    """Return True if the file has anything but white space."""
    with file.open("rb") as f:
        return any(line.removeprefix(BOM_UTF8).strip() for line in f)


def examples_in(file: Path, column_names: Columns = ()) -> Numbered:
    """Yield the examples of a file of a kind in ``JSON`` or ``CELLS``, or ``TEXT`` or ``PARQUET``.

    Args:
        file: a file with content (see ``has_content``).
        column_names: names of the columns of a CSV or TSV table without a header line; () for other
            data.

    Raises:
        UserError: a line is broken: it has NUL bytes, is not UTF-8 text, not valid JSON, no JSON
            object, or has another number of cells than the first line of a table. The message names
            file and line.
    """
    if file.suffix == PARQUET:
        return _parquet(file)
    refuse_nul_bytes(file)
    if file.suffix in CELLS:
        return _cells(file, column_names)
    return _json(file) if file.suffix in JSON else _whole_text(file)


def without_nulls(value: Any) -> Any:
    """Return a value of an Arrow table without the keys of its dicts whose values are null.

    An Arrow table gives each dict of a column all keys of the column, with null for those that the
    dict does not have.
    """
    if isinstance(value, dict):
        return {key: without_nulls(one) for key, one in value.items() if one is not None}
    if isinstance(value, list):
        return [without_nulls(one) for one in value]
    return value


def _parquet(file: Path) -> Numbered:
    table = parquet.ParquetFile(file)
    groups = range(table.metadata.num_row_groups)
    classes = class_names(table.schema_arrow)
    filled = [g for g in groups if table.metadata.row_group(g).num_rows > 0]
    for batch in table.iter_batches(batch_size=1000, row_groups=filled) if filled else ():
        names = batch.schema.names
        columns = [
            _values(column, classes.get(name, ()))
            for name, column in zip(names, batch.columns, strict=True)
        ]
        for row in zip(*columns, strict=True):
            example = {n: without_nulls(value) for n, value in zip(names, row, strict=True)}
            yield 0, example, json.dumps(example, default=_no_text)


def class_names(schema: pa.Schema) -> dict[str, list[str]]:
    """Return the names of the classes that an Arrow schema declares: those of each column that
    ``datasets`` has written as a ``ClassLabel``."""
    try:
        features = datasets.Features.from_arrow_schema(schema)
    except ValueError:  # a type that ``datasets`` does not have
        return {}
    return {
        name: list(one.names)
        for name, one in features.items()
        if isinstance(one, datasets.ClassLabel)
    }


def _values(column: Any, classes: Sequence[str]) -> list[Any]:
    """Return the values of a column of an Arrow table, with names for numbers of classes; a dict
    for each if it cannot be read, which is refused if the column is one that is read."""
    try:
        values = list(column.to_pylist())
        if not classes:
            return values
        return [classes[v] if v is not None and 0 <= v < len(classes) else v for v in values]
    except Exception as error:  # an unknown time zone, text that is no UTF-8
        return [{type(error).__name__: str(error)[:40]}] * len(column)


def _no_text(value: Any) -> dict[str, str]:
    # A dict, so that a date or an image is never taken for text.
    return {type(value).__name__: str(value)[:40]}


def _unnumbered(example: dict[str, Any]) -> tuple[int, dict[str, Any], str]:
    return 0, example, json.dumps(example)


def _whole_text(file: Path) -> Numbered:
    try:
        yield _unnumbered({"text": file.read_text(encoding="utf-8-sig")})
    except UnicodeDecodeError as error:
        line = file.read_bytes()[: error.start].count(b"\n") + 1
        raise UserError(_not_utf8(file, line, error)) from error


def _cells(file: Path, column_names: Columns) -> Numbered:
    # Everything stays text: an answer "42" is not a number, and "NA" is not a missing value.
    csv.field_size_limit(LARGEST_CELL)
    with file.open(newline="", encoding="utf-8-sig") as f:
        reader, begins = csv.reader(f, **CELLS[file.suffix]), 1
        try:
            first = next(cells for cells in reader if cells)
            names = _column_names(file, first, column_names)
            if column_names:
                _refuse_header(file, first, column_names)
                if not _is_empty(first):
                    yield _unnumbered(dict(zip(names, first, strict=True)))
            begins = reader.line_num + 1
            for cells in reader:
                if len(cells) not in (0, len(names)):
                    raise UserError(_other_width(file, reader.line_num, len(cells), len(names)))
                quoted = [c for c in cells if QUOTED.fullmatch(c)] if file.suffix == ".tsv" else []
                if quoted:
                    raise UserError(_quoted(file, reader.line_num, quoted[0]))
                if cells == first and len(first) > 1 and not column_names:
                    raise UserError(
                        f"{file}:{reader.line_num}: This line has the names of the columns, as if "
                        "two tables were joined. Remove it."
                    )
                if not _is_empty(cells):
                    yield _unnumbered(dict(zip(names, cells, strict=True)))
                begins = reader.line_num + 1
        except (csv.Error, UnicodeDecodeError) as error:
            said = " ".join(str(error).split())
            raise UserError(
                f"{file}:{begins}: This line or one after it cannot be read: {said}. Correct the "
                "file, or save it as UTF-8 text. A cell with a quote in it stands in quotes, and "
                'the quote in it is doubled: "5"" wide".'
            ) from error


def _is_empty(cells: Sequence[str]) -> bool:
    """Return True for an empty line, and for a row of empty cells, as spreadsheets save them below
    a table."""
    return not any(cell.strip() for cell in cells)


def empty_rows(file: Path) -> int:
    """Return the number of rows of a CSV or TSV table that are left out because all their cells are
    empty. Empty lines do not count."""
    with file.open(encoding="utf-8-sig") as f:  # most files have no line that could be one
        if not any(line != "\n" and not any(map(str.isalnum, line)) for line in f):
            return 0
    csv.field_size_limit(LARGEST_CELL)
    with file.open(newline="", encoding="utf-8-sig") as f:
        return sum(bool(row) and _is_empty(row) for row in csv.reader(f, **CELLS[file.suffix]))


def _quoted(file: Path, line: int, cell: str) -> str:
    return (
        f"{file}:{line}: The cell {cell[:40]!r} is quoted as in a CSV file, but quotes in a TSV "
        "file are read as letters. Save the table as CSV or JSON Lines."
    )


def _refuse_header(file: Path, first: list[str], given: Columns) -> None:
    """Raise UserError if the first line of a table has names of ``--column_names``, in letters of
    any case: it would be read as an example."""
    cells, names = ([name.strip().casefold() for name in line] for line in (first, given))
    if sorted(names) == sorted(cells):
        other = ", in another order" if names != cells else ""
        other = other or (", in other letters" if list(given) != first else "")
        raise UserError(
            f"{file}: Its first line has the names of --column_names{other}. It is a header: leave "
            "--column_names out."
        )
    if same := [name for name, cell in zip(names, cells, strict=True) if name == cell]:
        raise UserError(
            f"{file}: Its first line has the name {same[0]!r} in the column of that name, as a "
            "header has. Leave --column_names out and name its columns with options such as "
            "--prompt_field, or remove that line, or give the column another name if it is none."
        )


def _column_names(file: Path, first: list[str], given: Columns) -> list[str]:
    if given and len(given) != len(first):
        raise UserError(
            f"The first line of {file} has {len(first)} cells, but --column_names has "
            f"{len(given)} names. Give one name for each cell."
        )
    names = list(given or first)
    refuse_repeated_names(file, names)
    return names


def refuse_repeated_names(file: Path, names: Sequence[str]) -> None:
    """Raise UserError if two columns of a table have one name.

    Args:
        file: the file of the table.
        names: names of its columns.
    """
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        where = ", in the first line or with --column_names" if file.suffix in CELLS else ""
        raise UserError(
            f"{file} has several columns with the name {twice[0]!r}. Give each column a name of "
            f"its own{where}."
        )


def _other_width(file: Path, line: int, found: int, first: int) -> str:
    remedy = " Put cells that contain commas in quotes." if file.suffix == ".csv" else ""
    return f"{file}:{line}: This line has {found} cells, but the first has {first}.{remedy}"


def _json(file: Path) -> Numbered:
    """Yield the objects of a file of JSON Lines, or of one with a single JSON value."""
    with file.open("rb") as f:
        first = next(line for line in f if line.strip()).removeprefix(b"\xef\xbb\xbf").strip()
    is_lines = not first.startswith(b"[")
    if is_lines and file.suffix == ".json":  # its first line may be only a part of an object
        is_lines = first == b"null" or _is_object(first)
    return _json_lines(file) if is_lines else _json_value(file)


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line, parse_int=whole_number), dict)
    except (ValueError, RecursionError):
        return False


def _json_lines(file: Path) -> Numbered:
    with file.open("rb") as f:
        for number, line in enumerate(f, start=1):
            if line.strip():
                value = _parsed(file, number, line)
                if not isinstance(value, dict):
                    nulls = _is_null(line) + sum(map(_is_null, f))
                    raise UserError(f"{file}:{number}: {_no_object(value, nulls)}")
                if any(isinstance(one, _Repeated) for one in value.values()):
                    yield number, value, json.dumps(value)
                else:
                    yield number, value, line.decode("utf-8-sig").strip()


def _is_null(line: bytes) -> bool:
    return line.strip() == b"null"


def _json_value(file: Path) -> Numbered:
    value = _parsed(file, 1, file.read_bytes())
    if isinstance(value, dict):
        yield from map(_unnumbered, _transposed(value))
    for number, one in enumerate(value if isinstance(value, list) else [], start=1):
        one = {"text": one} if isinstance(one, str) else one  # a list of texts
        if not isinstance(one, dict):
            raise UserError(f"{file}, example {number}: {_no_object(one, 1)}")
        yield _unnumbered(one)
    if not isinstance(value, list | dict):
        raise UserError(f"{file}:1: {_no_object(value, 1)}")


def _transposed(value: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the examples of a JSON object: one, unless each of its values is a column, a list with
    one element for each example."""
    columns = list(value.values())
    are_columns = columns and all(isinstance(c, list) for c in columns)
    # {"messages": [{...}, ...]} is one chat.
    if not are_columns or any(isinstance(one, dict) for c in columns for one in c):
        return [value]
    if len({len(c) for c in columns}) > 1:
        return [value]
    return [dict(zip(value, row, strict=True)) for row in zip(*columns, strict=True)]


def _no_object(value: Any, nulls: int) -> str:
    if value is not None:
        return f"A JSON object {{...}} is needed, but this is {type(value).__name__}."
    found = f"{nulls} lines are null. This is the first." if nulls > 1 else "this is null."
    return (
        f"A JSON object {{...}} is needed, but {found} jq prints null for a key that does not "
        "exist. Remove null, or name another key there."
    )


def _parsed(file: Path, line: int, content: bytes) -> Any:
    """Return the JSON value in ``content``, which begins at ``line`` of ``file``."""
    try:
        text = content.decode("utf-8-sig")
        return _value(text)
    except UnicodeDecodeError as error:
        line += content[: error.start].count(b"\n")
        raise UserError(_not_utf8(file, line, error)) from error
    except json.JSONDecodeError as error:
        where = f"{file}:{line + error.lineno - 1}"
        raise UserError(
            f"{where}: This line is not valid JSON: {error.msg} (column {error.colno})."
        ) from error
    except (ValueError, RecursionError) as error:  # too deep, or a number of thousands of digits
        raise UserError(
            f"{file}:{line}: This line cannot be read: {type(error).__name__}: {error}. Correct it "
            "or remove it."
        ) from error


def _value(text: str) -> Any:
    """Return the value of a JSON text. A column of an example in which an object has a key several
    times is ``_Repeated``."""
    try:
        return json.loads(text, object_pairs_hook=unique_keys, parse_int=whole_number)
    except json.JSONDecodeError:
        raise
    except ValueError:
        value = json.loads(text, object_pairs_hook=_marked, parse_int=whole_number)
    return [_lifted(one) for one in value] if isinstance(value, list) else _lifted(value)


class _Repeated(dict[str, str]):
    """Value of a column in which an object has a key several times, of which JSON does not say
    which counts. It is a dict that no column that is read may have."""


def _marked(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object as a dict, in which a key that is there several times has a value of
    type ``_Repeated``."""
    found = dict(pairs)
    if len(found) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        twice = (key for key, count in counts.items() if count > 1)
        found |= {key: _Repeated({"key several times": key}) for key in twice}
    return found


def _lifted(example: Any) -> Any:
    """Return an example whose columns are ``_Repeated`` if there is such a value in them."""
    if not isinstance(example, dict):
        return example
    return {key: _repeated_in(value) or value for key, value in example.items()}


def _repeated_in(value: Any) -> _Repeated | None:
    if isinstance(value, _Repeated):
        return value
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return next(filter(None, map(_repeated_in, parts)), None)


def whole_number(digits: str) -> int | dict[str, str]:
    """Return a number as Python reads it. One of thousands of digits, which Python refuses, is a
    dict, so that no column that is read may have it."""
    return int(digits) if len(digits) < MOST_DIGITS else {"number": digits[:40]}


def _not_utf8(file: Path, line: int, error: UnicodeDecodeError) -> str:
    return (
        f"{file}:{line}: This line is not UTF-8 text ({error.reason}). Save the file as UTF-8 text."
    )
