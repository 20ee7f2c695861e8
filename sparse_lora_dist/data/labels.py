"""The labels of a data set: which classes there are, and which of them an example is in."""

from collections.abc import Collection, Sequence
from typing import Any

import datasets

from sparse_lora_dist.data.fields import ExampleError
from sparse_lora_dist.data.read_files import Columns, read_examples
from sparse_lora_dist.errors import UserError


def read_classes(source: str, *, label_field: str, column_names: Columns, flag: str) -> list[str]:
    """The different labels of ``source`` as text: numbers by size, names by the alphabet; or all
    that the data set itself says there are.

    Raises:
        UserError: no such column, a label that is neither whole number nor text, or all are equal.
    """
    examples = read_examples(
        source, split="train", max_samples=None, flag=flag, column_names=column_names
    )
    place, table = f"{flag} {source}", examples.table
    check_columns(table.column_names, [label_field], place)
    feature = table.features[label_field]
    found = set()
    for value in table.unique(label_field):
        try:
            found.add(label_of(value, feature))
        except ExampleError as error:
            raise examples.fault(table[label_field][:].index(value), str(error)) from error
    if isinstance(feature, datasets.ClassLabel):
        return list(feature.names)
    if len(found) < 2:
        raise UserError(f"{place}: every example has the label {found.pop()!r}; two are needed")
    return sorted(found, key=_by_size)


def label_of(value: Any, feature: Any) -> str:
    """A label as text.

    Raises:
        ExampleError: there is none, or it is of a kind that names no class.
    """
    if isinstance(feature, datasets.ClassLabel) and isinstance(value, int):
        if value < 0:  # how hub data sets mark examples whose labels are kept secret
            raise ExampleError("it has no label (-1)")
        return str(feature.names[value])
    if value == "":
        raise ExampleError("its label is empty")
    if isinstance(value, bool) or not isinstance(value, int | str):
        found = f"{type(value).__name__}: {str(value)[:40]}"
        raise ExampleError(f"a label must be a whole number or text, got {found}")
    return str(value)


def class_names(labels: Sequence[str], declared: Sequence[str]) -> Sequence[str]:
    """What to call the classes, in order: as the model has declared them where it knows all of the
    labels by name, else by the labels themselves."""
    return declared if set(labels) <= set(declared) else labels


def check_columns(columns: Collection[str], wanted: Sequence[str], place: str) -> None:
    """Raises UserError when a column of ``wanted`` (text, second text, label) is not there."""
    absent = [name for name in wanted if name not in columns]
    if absent:
        raise UserError(
            f"{place}: found no column {', '.join(map(repr, absent))}, which task seq_cls needs. "
            f"Its columns are: {', '.join(columns)}. Name them with --text_field, "
            "--text_pair_field and --label_field (and --column_names, if no line names them)"
        )


def _by_size(label: str) -> tuple[bool, int, str]:
    number = label.lstrip("-")
    is_number = number.isascii() and number.isdigit()
    return not is_number, int(label) if is_number else 0, label
