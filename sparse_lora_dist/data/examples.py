"""Hold the examples of a data set in a table on disk, and find file and line of each."""

import json
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as parquet
from datasets.fingerprint import Hasher

from sparse_lora_dist.data.local_files import (
    CELLS,
    TEXT,
    Columns,
    empty_rows,
    examples_in,
    whole_number,
    without_nulls,
)
from sparse_lora_dist.errors import UserError, in_words
from sparse_lora_dist.system.machine_errors import chain, in_plain_words

MESSAGES = "messages"
"""Name of the column of chats. Each is a list of messages, which are dicts."""
LOCAL = datasets.Features(
    {
        "example": datasets.Value("large_string"),
        "names": datasets.Value("string"),
        "file": datasets.Value("int32"),
        "line": datasets.Value("int64"),
    }
)
"""Columns of the table of JSON, CSV, TSV and text files. ``example`` is the whole example as JSON
text, so columns need no types. ``names`` is a JSON list of two lists: names of its columns, and of
the keys of its messages. ``file`` is the index of its file, ``line`` its line from 1 on or 0."""
EMPTY = "It is empty. Give data with at least one example."
MOST_ROWS, MOST_CHARACTERS = 1000, 1 << 24
"""Most rows of a part of the table, and characters of its examples, that are in memory."""
NAME = "sparse_lora_dist"
"""Name of the tables of this program in the cache of ``datasets``."""
VERSION = 5
"""Version of ``LOCAL``. Increase it when the same file gives other rows."""
TO_JSON = re.compile(r"(arguments|tool_calls?|function)\s*\|\s*tojson")
"""What a template has that writes the arguments of tool calls as JSON."""
TAKES_TEXT = re.compile(r"arguments\s+is\s+(not\s+)?string")
"""What a template has that takes arguments as text too."""


@dataclass(frozen=True, kw_only=True)
class Names:
    """The names that occur in the examples of a data set."""

    columns: tuple[str, ...]
    """Names of the columns."""
    message_keys: tuple[str, ...] = ()
    """Keys of the messages in the column ``messages``."""


@dataclass(frozen=True, kw_only=True)
class Examples:
    """The examples of one file, folder or hub data set, unchanged and in its order."""

    table: datasets.Dataset
    """One row for each example: with the columns ``LOCAL``, or with the columns of the data."""
    is_local: bool
    """True if ``table`` has the columns ``LOCAL``."""
    names: Names
    """Names of columns, and of keys of messages."""
    source: str
    """File, folder or id of a Hugging Face hub data set, as the user gave it."""
    files: tuple[Path, ...]
    """Paths of the files that hold the examples, in reading order; empty if they are not on this
    machine."""
    unread_files: tuple[str, ...] = ()
    """Paths of the other files of a folder, relative to it. They are not read."""

    def __len__(self) -> int:
        return len(self.table)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yield each example as a dict from column to value."""
        for row in self.table:
            yield self.decoded(row)

    @property
    def is_plain_text(self) -> bool:
        """True if each example is the whole text of a ``.txt`` file, in a column ``text``."""
        return bool(self.files) and self.files[0].suffix == TEXT

    @property
    def is_table(self) -> bool:
        """True if the examples are the lines of CSV or TSV tables."""
        return bool(self.files) and self.files[0].suffix in CELLS

    @property
    def shown_files(self) -> tuple[str, ...]:
        """Paths of ``files`` as text, relative to the folder if ``source`` is one."""
        folder = Path(self.source).expanduser()
        if not folder.is_dir():
            return tuple(map(str, self.files))
        return tuple(
            str(f.relative_to(folder)) if f.is_relative_to(folder) else str(f) for f in self.files
        )

    def feature(self, column: str) -> Any:
        """Return the declared type of a column, such as ``datasets.ClassLabel``; None if the data
        declare none."""
        return None if self.is_local else self.table.features[column]

    def only(self, columns: Iterable[str]) -> datasets.Dataset:
        """Return the part of ``table`` that is needed to read some columns.

        Args:
            columns: names of columns of the data.
        """
        return self.table.select_columns(["example"] if self.is_local else list(columns))

    def narrowed(self, columns: Iterable[str]) -> "Examples":
        """Return the examples without the columns that are not read, so that their values, which
        may be damaged images, need not be decoded.

        Args:
            columns: names of the columns that are read.
        """
        return self if self.is_local else replace(self, table=self.only(columns))

    def values(self, column: str) -> Iterator[Any]:
        """Yield the value of a column in each example; None where an example does not have it."""
        for batch in self.only([column]).iter(1000):
            if self.is_local:
                yield from (
                    json.loads(text, parse_int=whole_number).get(column)
                    for text in batch["example"]
                )
            else:
                yield from batch[column]

    def decoded(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Return an example as a dict from column to value.

        Args:
            row: a row of ``table``, or of what ``only`` returns.
        """
        if self.is_local:
            example: dict[str, Any] = json.loads(row["example"], parse_int=whole_number)
            return example
        return {column: without_nulls(value) for column, value in row.items()}

    def fault(self, index: int, what: str) -> UserError:
        """Return the error to raise for a wrong example, with its file and line.

        Args:
            index: number of the example: its row in ``table``, from 0.
            what: sentence that says what is wrong with the example.
        """
        return UserError(f"{self.place(index)}: {what}")

    def place(self, index: int) -> str:
        """Return a text that says where an example is: "file:line" for JSON Lines, otherwise "file,
        example n" with n counted from 1.

        Args:
            index: number of the example: its row in ``table``, from 0.
        """
        if self.is_local:
            row = self.table[index]
            file = self.files[row["file"]]
            if row["line"]:
                return f"{file}:{row['line']}"
            before = self.table["file"][:index]
            return f"{file}, example {sum(f == row['file'] for f in before) + 1}"
        for file in self.files:
            count = parquet.read_metadata(file).num_rows if file.suffix == ".parquet" else 0
            if index < count:
                return f"{file}, example {index + 1}"
            index -= count
        return f"{self.source}, example {index + 1}"


def quoted_cells(examples: Examples, columns: Collection[str]) -> str:
    """Return a note about cells of a TSV file that stand in quotes, as programs write those with a
    comma; "" if there are none in the first 1000 examples.

    Args:
        examples: the examples.
        columns: columns that are read.
    """
    if not examples.files or examples.files[0].suffix != ".tsv":
        return ""
    cells = (str(record.get(c) or "") for record in islice(examples, 1000) for c in columns)
    # A quote that opens and does not close: the cell went on in the next line, or after a tab.
    quoted = (c[:1] == '"' and (c[1:].endswith('"') or c.count('"') % 2 == 1) for c in cells)
    if not (count := sum(quoted)):
        return ""
    return (
        f"cells of a TSV file that stand in quotes: {count} in the first rows. The quotes are "
        "learned as letters. If a program has put them there, save the table as CSV or JSON Lines"
    )


def rows_left_out(examples: Examples) -> str:
    """Return a note about rows of CSV or TSV tables that are left out, since all their cells are
    empty; "" if there are none."""
    count = sum(map(empty_rows, examples.files)) if examples.is_table and examples.is_local else 0
    return f"rows of empty cells are left out: {count:,}" if count else ""


def rows_of_another_template(examples: Examples, template: str | None, own: object) -> str:
    """Return a note if the tokenizer has a template for rows with tools, which renders rows without
    them too; "" if there are none, or if it has no such template.

    Args:
        examples: the examples.
        template: the jinja text that renders all of them.
        own: chat template of the tokenizer; a dict from name to text if it has several.
    """
    if not isinstance(own, dict) or template != own.get("tool_use") or len({*own.values()}) == 1:
        return ""
    without = sum(not tools for tools in examples.values("tools"))
    if without == 0:
        return ""
    return (
        "the tokenizer's chat template tool_use renders all rows, as the data have tools. "
        f"{without:,} rows have none, and transformers would render them with its template "
        "default. Put rows with and without tools into data sets of their own if that matters."
    )


def text_in_place_of_arguments(examples: Examples, template: str | None) -> str:
    """Return a note about arguments of tool calls that are JSON text, where the template writes
    JSON itself; "" if there are none in the first 1000 examples."""
    if template is None or TO_JSON.search(template) is None or TAKES_TEXT.search(template):
        return ""
    calls = (
        call.get("function", call)
        for record in islice(examples, 1000)
        for message in record.get(MESSAGES, ())
        for call in message.get("tool_calls") or ()
    )
    if not any(isinstance(call.get("arguments"), str) for call in calls):
        return ""
    return (
        "the arguments of tool calls are JSON text, which the chat template writes as a quoted "
        'string with \\" in it. Give them as objects, which it writes as JSON.'
    )


@contextmanager
def from_cache(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Context manager: errors of the body come from files in the cache, such as one that was cut
    short on a full disk.

    Args:
        folder: folder of the cache whose files are read.

    Raises:
        UserError: the body raised an exception. It names the folder, and not the user's data.
            What the user's data or the machine cause, and errors of a disk, are raised unchanged.
    """
    try:
        yield
    except Exception as error:
        of_data = any(isinstance(one, UserError) for one in chain(error))
        of_disk = isinstance(error, OSError) and error.errno is not None
        if of_data or of_disk or in_plain_words(error) is not None:
            raise
        raise UserError(
            f"The cache {Path(folder)} of the package datasets is damaged: {in_words(error)}. It "
            "holds only copies of data, which are made again: remove this folder, while no job "
            "uses it, and start again."
        ) from error


def local_table(files: tuple[Path, ...], column_names: Columns) -> datasets.Dataset:
    """Return the table of the examples of JSON, CSV, TSV or text files. It has the columns
    ``LOCAL`` and is kept on disk, so memory does not grow with the data.

    Args:
        files: files with content, in reading order.
        column_names: names of the columns of tables without a header line; () for other data.

    Raises:
        UserError: a file has a broken line.
    """
    identity = Hasher.hash((VERSION, tuple(column_names), fingerprint(files)))
    config_id = f"default-{identity}"
    with from_cache(Path(datasets.config.HF_DATASETS_CACHE) / NAME / config_id):
        builder = _LocalBuilder(
            dataset_name=NAME,
            config_id=config_id,
            files=files,
            column_names=tuple(column_names),
            # A table of one row is kept in memory until there are so many. A text may be large.
            writer_batch_size=1 if files[0].suffix == TEXT else MOST_ROWS,
        )
    builder.download_and_prepare()
    with from_cache(builder.cache_dir):
        table = builder.as_dataset(split="train")
    table._fingerprint = identity
    return table


@dataclass
class _LocalConfig(datasets.BuilderConfig):  # type: ignore[misc]
    files: tuple[Path, ...] = ()
    column_names: tuple[str, ...] = ()


class _LocalBuilder(datasets.ArrowBasedBuilder):  # type: ignore[misc]
    """Writes the table ``LOCAL`` of some files, as ``datasets`` asks it to."""

    BUILDER_CONFIG_CLASS = _LocalConfig

    def _info(self) -> datasets.DatasetInfo:
        return datasets.DatasetInfo(features=LOCAL)

    def _split_generators(self, dl_manager: Any) -> list[Any]:
        return [datasets.SplitGenerator(name="train", gen_kwargs={})]

    def _generate_tables(self) -> Iterator[tuple[int, pa.Table]]:
        rows: list[tuple[str, str, int, int]] = []
        size = number = 0
        for row in _rows(self.config.files, self.config.column_names):
            rows.append(row)
            size += len(row[0])
            if len(rows) == MOST_ROWS or (size >= MOST_CHARACTERS and len(rows) > 1):
                yield number, _arrow(rows)
                rows, size, number = [], 0, number + 1
        if not rows and number == 0:  # a list without elements, a table with a header line only
            raise ValueError(EMPTY)
        if rows:
            yield number, _arrow(rows)


def _arrow(rows: list[tuple[str, str, int, int]]) -> pa.Table:
    columns = map(list, zip(*rows, strict=True))
    return pa.Table.from_arrays(
        [pa.array(c, f.type) for c, f in zip(columns, LOCAL.arrow_schema, strict=True)],
        schema=LOCAL.arrow_schema,
    )


def local_names(table: datasets.Dataset) -> Names:
    """Return the names that occur in a table with the columns ``LOCAL``."""
    found: tuple[dict[str, None], dict[str, None]] = ({}, {})
    for text in table.unique("names"):
        for names, more in zip(found, json.loads(text), strict=True):
            names.update(dict.fromkeys(more))
    return Names(columns=tuple(found[0]), message_keys=tuple(found[1]))


def declared_names(table: datasets.Dataset) -> Names:
    """Return the names in the schema of a table that has the columns of the data."""
    messages = table.features.get(MESSAGES)
    one = getattr(messages, "feature", None) or (messages[0] if isinstance(messages, list) else {})
    keys = tuple(one) if isinstance(one, dict) else ()
    return Names(columns=tuple(table.column_names), message_keys=keys)


def fingerprint(files: Iterable[Path]) -> str:
    """Return a text that identifies the content of files: their kinds, sizes, dates, and a hash of
    samples of each. The dates alone do not: tar and rsync set them."""
    return str(Hasher.hash([_file_identity(file) for file in files]))


SAMPLE = 1 << 16
"""Bytes of each sample."""
MOST_SAMPLES = 64


def _file_identity(file: Path) -> tuple[str, int, int, str]:
    stat = file.stat()
    stride = max(SAMPLE, stat.st_size // MOST_SAMPLES)
    starts = [*range(0, stat.st_size, stride), max(0, stat.st_size - SAMPLE)]
    with file.open("rb") as f:
        samples = [(f.seek(start), f.read(SAMPLE)) for start in starts]
    return file.suffix, stat.st_size, stat.st_mtime_ns, str(Hasher.hash(samples))


def _rows(files: tuple[Path, ...], column_names: Columns) -> Iterator[tuple[str, str, int, int]]:
    """Yield the values of the columns ``LOCAL`` for each example."""
    # Most examples have the same names.
    texts: dict[tuple[tuple[str, ...], ...], str] = {}
    for index, file in enumerate(files):
        for line, example, text in examples_in(file, column_names):
            names = (tuple(example), _message_keys(example))
            if names not in texts:
                if len(texts) == MOST_ROWS:
                    texts.clear()
                texts[names] = json.dumps(names)
            yield text, texts[names], index, line


def _message_keys(example: Mapping[str, Any]) -> tuple[str, ...]:
    messages = example.get(MESSAGES)
    messages = messages if isinstance(messages, list) else []
    return tuple(dict.fromkeys(key for one in messages if isinstance(one, dict) for key in one))
