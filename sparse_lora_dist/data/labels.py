"""The labels of a data set: the classes that it has, and the class of an example."""

from collections.abc import Collection, Sequence
from typing import Any

import datasets

from sparse_lora_dist.data.fields import ExampleError
from sparse_lora_dist.data.read_files import Columns, read_examples
from sparse_lora_dist.errors import UserError


def read_classes(source: str, *, label_field: str, column_names: Columns, flag: str) -> list[str]:
    """Find the labels of a data set.

    Args:
        source: file, folder or hub id; see ``read_examples``.
        label_field: column of the labels.
        column_names: names of the columns of a table without a header line.
        flag: command-line flag that holds ``source``, for messages.

    Returns:
        The labels as text: all that the data set declares, in its order; else those that occur,
        numbers by size and names by the alphabet.

    Raises:
        UserError: the column is missing, a label is neither a whole number nor text, or all labels
            are equal.
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
        raise UserError(
            f"{place}: every example has the label {found.pop()!r}; two are needed. Give data with "
            "at least two different labels, or another --label_field"
        )
    return sorted(found, key=_by_size)


def label_of(value: Any, feature: Any) -> str:
    """A label as text.

    Args:
        value: value of the label column.
        feature: type of the column in ``datasets``.

    Raises:
        ExampleError: it is missing, or neither a whole number nor text.
    """
    if isinstance(feature, datasets.ClassLabel) and isinstance(value, int):
        if value < 0:  # hub data sets mark examples with secret labels so
            raise ExampleError("it has no label (-1)")
        return str(feature.names[value])
    if value == "":
        raise ExampleError("its label is empty")
    if isinstance(value, bool) or not isinstance(value, int | str):
        found = f"{type(value).__name__}: {str(value)[:40]}"
        raise ExampleError(f"a label must be a whole number or text, got {found}")
    return str(value)


def class_names(labels: Sequence[str], declared: Sequence[str]) -> Sequence[str]:
    """Names of the classes, in order.

    Args:
        labels: labels of the data.
        declared: class names in the model's config.

    Returns:
        ``declared`` if it contains all labels, else ``labels``.
    """
    return declared if set(labels) <= set(declared) else labels


def check_columns(columns: Collection[str], wanted: Sequence[str], place: str) -> None:
    """Check that the columns ``wanted`` (text, second text, label) exist.

    Raises:
        UserError: one does not; names those that do.
    """
    absent = [name for name in wanted if name not in columns]
    if absent:
        raise UserError(
            f"{place}: found no column {', '.join(map(repr, absent))}, which task seq_cls needs. "
            f"Its columns are: {', '.join(columns)}. Name them with --text_field, "
            "--text_pair_field and --label_field (and with --column_names, if the file has no "
            "header line)"
        )


def _by_size(label: str) -> tuple[bool, int, str]:
    number = label.lstrip("-")
    is_number = number.isascii() and number.isdigit()
    return not is_number, int(label) if is_number else 0, label
