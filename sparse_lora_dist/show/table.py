"""Formats trained modules as a table for the terminal."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

from sparse_lora_dist.distributed.console import counted, megabytes

TITLES = ("module", "rank", "of", "density", "bytes", "norm of the update")
"""Headings of the columns. "of" is the largest rank possible; density is the fraction of the
trained entries that are not zero; the update is what the adapter adds to the weight."""


@dataclass(frozen=True, kw_only=True)
class Module:
    """A trained module: a linear with an adapter, or a module trained in full."""

    name: str
    """Name of the module in the model."""
    rank: int | None = None
    """Number of rank-1 components in use; None for a module trained in full."""
    capacity: int | None = None
    """Largest number of components that the tensors can hold; None for a module trained in full."""
    entries: int
    """Number of trained entries, zeros included."""
    alive: int
    """Number of entries that are not zero. In a checkpoint, dead entries are not counted either."""
    bytes: int
    """Bytes that the module's tensors take in the files."""
    norm: float | None = None
    """Frobenius norm of the change that the adapter makes to the module's weight. None for a module
    trained in full, and if the change depends on the base weight, which is not read."""


def table(modules: Sequence[Module]) -> str:
    """Return the table as text: a line of headings, one line per module, and a line with totals.

    The total of the norms is the Frobenius norm of all weight changes together, that is the root of
    the sum of their squares.
    """
    rows = [TITLES, *map(_cells, modules), _together(modules)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(TITLES))]
    return "\n".join(_line(row, widths) for row in rows)


def _cells(module: Module) -> tuple[str, ...]:
    """Return the cells of a module's line as text, one for each of ``TITLES``."""
    return (
        module.name,
        "full" if module.rank is None else str(module.rank),
        "" if module.capacity is None else str(module.capacity),
        _density(module.alive, module.entries),
        f"{module.bytes:,}",
        "" if module.norm is None else f"{module.norm:.4g}",
    )


def _together(modules: Sequence[Module]) -> tuple[str, ...]:
    """Return the cells of the line with totals over ``modules``, one for each of ``TITLES``. The
    norm is empty if that of no module is known."""
    norms = [m.norm for m in modules if m.norm is not None]
    return (
        counted(len(modules), "module"),
        str(sum(m.rank or 0 for m in modules)),
        str(sum(m.capacity or 0 for m in modules)),
        _density(sum(m.alive for m in modules), sum(m.entries for m in modules)),
        megabytes(sum(m.bytes for m in modules)),
        f"{sqrt(sum(norm**2 for norm in norms)):.4g}" if norms else "",
    )


def _density(alive: int, entries: int) -> str:
    return f"{alive / max(1, entries):.4f}"


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    first, *others = (f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
    return "  ".join([f"{cells[0]:<{len(first)}}", *others]).rstrip()
