"""What of a grid of parameters ``make test`` runs, and what it leaves to ``make test-all``."""

from collections.abc import Callable, Iterable, Sequence
from itertools import product
from typing import Any

import pytest


def in_full(*values: Any) -> Any:
    """A row of parameters that is left to ``make test-all``: it takes long and seldom breaks."""
    return pytest.param(*values, marks=pytest.mark.full)


def some(every: Iterable[str], chosen: str) -> list[Any]:
    """The rows of one parameter. ``make test`` runs the ``chosen`` (names with spaces between)."""
    kept = chosen.split()
    return [row if row in kept else in_full(row) for row in every]


def grid(
    names: str, *axes: Sequence[Any], ids: Callable[[Any], str] | None = None
) -> pytest.MarkDecorator:
    """Every combination of the axes. ``make test`` runs as many as the longest axis has values, in
    which each value of each axis stands at least once; the others are left to ``make test-all``.

    Axes (a b c) and (1 2): a1 b2 c1 run, a2 b1 c2 are left.
    """
    count = max(len(axis) for axis in axes)
    chosen = {tuple(i % len(axis) for axis in axes) for i in range(count)}
    rows = []
    for places in product(*(range(len(axis)) for axis in axes)):
        row = [axis[place] for axis, place in zip(axes, places, strict=True)]
        rows.append(pytest.param(*row) if places in chosen else in_full(*row))
    return pytest.mark.parametrize(names.split(), rows, ids=ids)
