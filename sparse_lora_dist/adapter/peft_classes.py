"""Put the rows of the head in a classifier's adapter into the order of a run's classes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

from torch import Tensor

from sparse_lora_dist.adapter.peft_config import LABELS
from sparse_lora_dist.distributed.console import print_line
from sparse_lora_dist.errors import UserError
from sparse_lora_dist.system.small_files import parse_json
from sparse_lora_dist.zero3.slices import Values

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, kw_only=True)
class ClassRows:
    """The classes of a run's classifier, and the tensors of its head with a row for each."""

    names: Sequence[str]
    """Names of the classes, in the order of the logits."""
    parameters: Sequence[str]
    """Names of the head's parameters whose first size is the number of classes."""


def class_names(folder: Path) -> list[str]:
    """Return the class names that are stored beside an adapter, in the order of its head's rows.

    Args:
        folder: local folder of the adapter.

    Returns:
        The names; an empty list if there is no id2label.json, as PEFT writes none.

    Raises:
        UserError: the file is damaged.
    """
    if not (file := folder / LABELS).is_file():
        return []
    try:
        named = parse_json(file.read_bytes())
        return [str(named[str(number)]) for number in range(len(named))]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{file} is damaged: {error!r}. Export the adapter again, or correct or remove the "
            "file."
        ) from error


def other_classes(found: Sequence[str], theirs: Shapes, classes: ClassRows) -> list[str]:
    """Return why an adapter's head is not one for the run's classes.

    Args:
        found: class names that are stored beside the adapter; empty if there are none.
        theirs: name of a tensor of the adapter -> its shape.
        classes: the classes of the run.

    Returns:
        A sentence for a message; an empty list if the head fits, or if the adapter has none.
    """
    counts = [theirs[name][0] for name in classes.parameters if theirs.get(name)]
    labels = f"but --data has the labels {', '.join(classes.names)}. Give data with the adapter's "
    labels += "labels, or an adapter of these classes."
    if not counts:
        return []
    if found and len(found) != counts[0]:
        return [
            f"Its {LABELS} names {len(found)} classes, but its head has {counts[0]}. Export the "
            "adapter again."
        ]
    if _comparable(found, classes.names) and sorted(found) != sorted(classes.names):
        return [f"Its head is for the classes {', '.join(found)}, {labels}"]
    if counts[0] != len(classes.names):
        return [f"Its head has {counts[0]} classes, {labels}"]
    return []


def by_class_names(
    folder: str,
    found: Sequence[str],
    values: Mapping[str, Values],
    classes: ClassRows,
    shapes: Shapes,
) -> dict[str, Values]:
    """Return an adapter's tensors with the rows of its head in the order of the run's classes.

    A line says so where the order changes, and where there are no names to compare.

    Args:
        folder: the adapter as the user named it.
        found: class names that are stored beside the adapter; empty if there are none.
        values: tensor name -> function that reads a range of the adapter's tensor.
        classes: the classes of the run, which the adapter's head is for (``other_classes``).
        shapes: tensor name -> shape, for every tensor of the adapter.

    Raises:
        UserError: the order must change, and more modules than one may have a row for each class.
    """
    held = [name for name in classes.parameters if name in values]
    wanted = ", ".join(classes.names)
    if not held or list(found) == list(classes.names):
        return dict(values)
    if not _comparable(found, classes.names):
        print_line(
            "note",
            f"the class names of --init_adapter {folder} ({LABELS}) cannot be compared with the "
            f"labels of --data: the rows of its head are taken to be, in this order, {wanted}",
        )
        return dict(values)
    if len({name.rpartition(".")[0] for name in held}) > 1:
        raise UserError(
            f"The head of --init_adapter {folder} is for the classes {', '.join(found)} in this "
            f"order, and that of the run for {wanted}, but {' and '.join(held)} have as many rows "
            "as there are classes, so it is not known which to reorder. Write the adapter's "
            f"{LABELS} as id2label of the base's config.json."
        )
    print_line("note", f"the rows of --init_adapter's head are taken by their names: {wanted}")
    order = [found.index(name) for name in classes.names]
    return {**values} | {name: _rows(values[name], shapes[name], order) for name in held}


def _comparable(found: Sequence[str], names: Sequence[str]) -> bool:
    """Return False if one side has no names but the numbers of the classes."""
    unnamed = [f"LABEL_{number}" for number in range(len(found))]
    numbers = [str(number) for number in range(len(names))]
    named = list(names) != numbers or bool({*found} & {*names})
    return named and list(found) not in ([], unnamed)


def _rows(values: Values, shape: tuple[int, ...], order: list[int]) -> Values:
    def reordered(start: int, stop: int) -> Tensor:
        whole = values(0, prod(shape)).view(shape)  # a head is small
        return whole[order].flatten()[start:stop]

    return reordered
