"""Find the labels of a data set, which are its classes, and the label of an example."""

import re
import unicodedata
from collections.abc import Collection, Sequence
from typing import Any

import datasets

from sparse_lora_dist.data.fields import ExampleError, refuse_halves
from sparse_lora_dist.data.local_files import Columns
from sparse_lora_dist.data.read_files import read_examples
from sparse_lora_dist.errors import UserError


def read_classes(source: str, *, label_field: str, column_names: Columns, flag: str) -> list[str]:
    """Find the distinct labels of a data set, which are the classes of a classifier. Not a
    collective.

    Args:
        source: file, folder or id of a Hugging Face hub data set; see ``read_examples``.
        label_field: name of the column of labels.
        column_names: names of the columns of a table without a header line; () for other data.
        flag: the command-line flag whose value is ``source``, for messages.

    Returns:
        The labels as text. If the data set declares labels (``datasets.ClassLabel``), all of these
        in their order; otherwise those that occur, whole numbers first and by size, then names in
        alphabetical order.

    Raises:
        UserError: the column is missing, a label is neither a whole number nor text, or all labels
            are equal.
    """
    examples = read_examples(
        source, split="train", max_samples=None, flag=flag, column_names=column_names
    )
    place = f"{flag} {source}"
    check_columns(examples.names.columns, [label_field], place)
    feature = examples.feature(label_field)
    found: set[str] = set()
    first: Any = None
    for index, value in enumerate(examples.values(label_field)):
        try:
            found.add(label_of(value, feature))
        except ExampleError as error:
            raise examples.fault(index, str(error)) from error
        first = value if first is None else first
        if type(first) is not type(value):
            raise examples.fault(index, _mixed(first, value))
    declared = isinstance(feature, datasets.ClassLabel)
    labels = list(feature.names) if declared else sorted(found, key=_by_size)
    if len(labels) < 2:
        raise UserError(
            f"Every example of {place} has the label {labels[0]!r}, but a classifier needs "
            "at least two classes. Give data with two different labels or more, or name another "
            "column with --label_field."
        )
    return _checked(labels, place)


def _mixed(first: object, value: object) -> str:
    return (
        f"Its label {value!r} is {type(value).__name__}, but an earlier label {first!r} is "
        f"{type(first).__name__}. Write all labels as whole numbers, or all as text."
    )


def _checked(labels: list[str], place: str) -> list[str]:
    """Return ``labels``, unless one of them marks examples without a label, or two of them look the
    same."""
    seen: dict[str, str] = {}
    for label in labels:
        key = unicodedata.normalize("NFC", " ".join(label.split()))
        key = str(int(key)) if re.fullmatch(r"[-+]?[0-9]{1,20}", key) else key
        other = seen.setdefault(key, label)
        if other != label:
            raise UserError(
                f"{place} has the labels {other!r} and {label!r}, which are one label written in "
                "two ways. Write them in the same way."
            )
    is_unknown = {"-1", "0", "1", "2"} <= set(labels) and "-2" not in labels
    if is_unknown:
        raise UserError(
            f"{place} has the labels {', '.join(labels[:6])}. In such data sets -1 marks examples "
            "whose label is unknown, which is no class. Remove these examples, or give the classes "
            "names."
        )
    return labels


def names_beside_numbers(labels: Sequence[str]) -> list[str]:
    """Return the labels that are no whole numbers if others are; else none."""
    names = [label for label in labels if _by_size(label)[0]]
    return names if len(names) < len(labels) else []


def label_of(value: Any, feature: Any) -> str:
    """Return the label of an example as text.

    Args:
        value: value of the label column: a whole number or text.
        feature: type of the column in ``datasets``; a ``ClassLabel`` turns numbers into names.

    Raises:
        ExampleError: the label is missing, or neither a whole number nor text, or has half of a
            surrogate pair.
    """
    if isinstance(feature, datasets.ClassLabel) and isinstance(value, int):
        if value < 0:  # hub data sets mark examples with secret labels so
            raise ExampleError(
                "This example has the label -1, which means that its label is unknown. Give data "
                "in which each example has a label, or remove this example."
            )
        if value >= len(feature.names):
            raise ExampleError(
                f"The label of this example is class {value}, but the column declares the classes "
                f"0 to {len(feature.names) - 1}. Correct the label, or write labels as text."
            )
        return str(feature.names[value])
    if isinstance(value, str) and not value.strip():
        raise ExampleError("The label of this example is empty. Give it a whole number or text.")
    if isinstance(value, bool) or not isinstance(value, int | str):
        found = f"{type(value).__name__}: {str(value)[:40]}"
        raise ExampleError(f"The label must be a whole number or text, got {found}")
    refuse_halves(str(value), "The label")
    return str(value)


def class_names(labels: Sequence[str], declared: Sequence[str]) -> Sequence[str]:
    """Return the names of the classes, in the order of the class numbers: the class names in the
    model's config if they include every label of the data, otherwise the labels of the data.

    Args:
        labels: distinct labels of the data, from ``read_classes``.
        declared: class names in the model's config, in the order of the class numbers.

    Returns:
        ``declared`` if it contains all labels of the data, otherwise ``labels``.
    """
    return declared if set(labels) <= set(declared) else labels


def check_columns(columns: Collection[str], wanted: Sequence[str], place: str) -> None:
    """Raise UserError if a column that classification reads does not exist.

    Args:
        columns: names of the columns of the data set.
        wanted: names of the columns that must exist, those of texts and labels.
        place: text with which the error message begins, e.g. "--data x.jsonl".

    Raises:
        UserError: one of ``wanted`` does not exist; the message lists ``columns``.
    """
    absent = [name for name in wanted if name not in columns]
    if absent:
        raise UserError(
            f"{place} has no column {', '.join(map(repr, absent))}, which --task seq_cls needs. "
            f"Its columns are: {', '.join(columns)}. Name the columns to read with --text_field, "
            "--text_pair_field and --label_field. If the file has no header line, name all of its "
            "columns with --column_names."
        )


def _by_size(label: str) -> tuple[bool, int, str]:
    is_number = re.fullmatch(r"-?[0-9]{1,20}", label) is not None
    return not is_number, int(label) if is_number else 0, label
