"""Heat maps of the ranks of sites (linears that carry adapters). If no rank changes, the maps show
the share of a site's entries that the optimizer steps. One map has the axes layer and kind of
module, the others layer and step."""

from collections.abc import Mapping
from math import prod
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from sparse_lora_dist.distributed.console import counted
from sparse_lora_dist.report.jsonl import is_count
from sparse_lora_dist.report.layer_grid import Layout, layout_of
from sparse_lora_dist.report.run_data import RunData
from sparse_lora_dist.report.style import WIDTH, Picture, panels

READABLE = 16
"""Largest number of layers, and of kinds of module, of a map whose cells have room for a number."""
MOST_LABELS = 40
"""Largest number of kinds of module that the map of layers and modules labels."""
MOST_PANELS = 24
"""Largest number of kinds of module that have a panel over time. A model has about ten; a module
whose name holds no layer number is a kind of its own."""
FEW_RANKS = 32
"""Largest rank up to which every rank has a colour of its own."""


class Shares:
    """The values of sites that the maps show, with their layout and colours.

    The value of a site is its rank if the method changes ranks, or if no checkpoint gives the sizes
    of the sites. Otherwise it is the share of the site's entries that the optimizer steps, from 0
    to 1.

    Args:
        run: a run in which the method has made at least one decision (a change of ranks or of the
            entries that are stepped).

    Attributes:
        sizes: number of trained entries of each site, by its name.
        capacity: the run's option ``rank``, or the largest rank of a site after any decision if
            that is larger.
        of_ranks: True if the values are ranks, False if they are shares.
        name: "rank" or "share", used in names of PNG files.
        title: what the values are, for the title of a figure.
        layout: position of each site in the grid of layers and modules.
    """

    def __init__(self, run: RunData) -> None:
        self.run, sites = run, run.decisions[0]["ranks"]
        ranks = {rank for row in run.decisions for rank in row["ranks"].values()}
        rank = run.options.get("rank")
        self.sizes = _entries(run)
        self.capacity = max(rank if is_count(rank) else 1, 1, *ranks)
        self.of_ranks = ranks != {self.capacity} or not sites.keys() <= self.sizes.keys()
        self.name = "rank" if self.of_ranks else "share"
        self.title = "Rank" if self.of_ranks else "Stepped entries"
        self.layout: Layout = layout_of(sites)

    @property
    def note(self) -> str:
        """Sentences for the captions of maps of shares; empty for maps of ranks."""
        if self.of_ranks:
            return ""
        return (
            " The value of a site is the share of its entries that are stepped by the optimizer. "
            "Some of these may be zero; launcher/show.py counts the zeros of a checkpoint."
        )

    @property
    def all_one(self) -> bool:
        """True if every entry is stepped at all times, so that a map would show nothing. This is so
        for methods that set entries to zero after a step, but go on stepping all entries."""
        rows = self.run.decisions
        return not self.of_ranks and all(v == 1 for row in rows for v in self.of(row).values())

    def of(self, decision: Mapping[str, Any]) -> Mapping[str, float]:
        """Return the values after a decision: name of a site -> value.

        Args:
            decision: JSON object of one line of decisions.jsonl.
        """
        if self.of_ranks:
            return dict(decision["ranks"])
        return {site: live / self.sizes[site] for site, live in decision["live"].items()}

    def colours(self, axes: Any, mesh: Any, figure: Any) -> None:
        """Draw the colour bar of a map.

        Args:
            axes: matplotlib axes, or an array of axes, that the bar is drawn beside.
            mesh: the map, as ``pcolormesh`` returns it.
            figure: the figure that has the axes.
        """
        label = "rank" if self.of_ranks else "share stepped"
        bar = figure.colorbar(mesh, ax=axes, label=label, fraction=0.04, pad=0.02)
        bar.outline.set_visible(False)
        bar.locator = MaxNLocator(integer=self.of_ranks)
        bar.update_ticks()
        bar.solids.set(rasterized=True)

    @property
    def style(self) -> dict[str, Any]:
        """Keyword arguments of ``pcolormesh`` for a grid of values: colours and their range."""
        steps = self.capacity + 1 if self.of_ranks and self.capacity <= FEW_RANKS else 256
        return {
            "cmap": colormaps["viridis"].resampled(steps),
            "vmin": 0,
            "vmax": self.capacity if self.of_ranks else 1.0,
            "rasterized": True,  # a path a cell would make the page of a large model megabytes
        }


def _entries(run: RunData) -> dict[str, int]:
    """Return the number of trained entries of each site: name of a site -> number.

    They are read from the newest checkpoint with a readable manifest; without one, the dict is
    empty.
    """
    manifest = next((s.manifest for s in reversed(run.checkpoints) if s.manifest), None)
    if manifest is None:
        return {}
    sizes = dict.fromkeys(manifest["sites"]["pieces"], 0)
    for name, shape in manifest["tensors"].items():
        if (site := name.rpartition(".")[0]) in sizes:
            sizes[site] += prod(shape)
    return sizes


def final_map(run: RunData) -> Picture:
    """Draw the map of all sites after the last decision: their ranks or their shares (``Shares``).

    It has a row per layer and a column per kind of module.

    Args:
        run: a run in which the method has made at least one decision.
    """
    shares, decision = Shares(run), run.decisions[-1]
    grid = shares.layout.grid(shares.of(decision))
    num_layers, num_modules = grid.shape
    height = min(9.0, 1.5 + 0.26 * num_layers)
    figure, (axes,) = panels(height=height)
    mesh = axes.pcolormesh(grid, edgecolors="none", **shares.style)
    if num_layers <= READABLE and num_modules <= READABLE:
        _write_numbers(axes, grid, shares)
    labelled = range(0, num_modules, -(-num_modules // MOST_LABELS))
    names = [shares.layout.modules[i] for i in labelled]
    axes.set_xticks([i + 0.5 for i in labelled], names, rotation=35, ha="right")
    _label_layers(axes, shares.layout, most=20)
    axes.set_ylabel("layer")
    axes.grid(False)
    shares.colours(axes, mesh, figure)
    return Picture(
        name=f"final_{shares.name}",
        title=f"{shares.title} at the end",
        caption=f"After the decision of step {decision['step']}, the last so far.{shares.note}",
        figure=figure,
    )


def _write_numbers(axes: Any, grid: Any, shares: Shares) -> None:
    """Write the value of each cell of ``grid`` into the cell, in black or white by its colour."""
    bright = shares.style["vmax"] * 0.6
    for (row, column), value in np.ndenumerate(grid):
        if not np.isnan(value):
            text = f"{value:.0f}" if shares.of_ranks else f"{value:.2f}"
            colour = "#000000" if value > bright else "#ffffff"
            axes.text(column + 0.5, row + 0.5, text, ha="center", va="center", color=colour, size=8)


def _label_layers(axes: Any, layout: Layout, *, most: int) -> None:
    """Label the y axis with layer numbers, at most ``most`` of them."""
    every = next(
        n for n in (1, 2, 5, 10, 20, 50, len(layout.layers)) if n * most >= len(layout.layers)
    )
    places = range(0, len(layout.layers), every)
    axes.set_yticks([p + 0.5 for p in places], [str(layout.layers[p]) for p in places])


def growth(run: RunData) -> Picture:
    """Draw maps of all sites over optimizer steps: their ranks or their shares (``Shares``).

    Each kind of module has a panel, with a row per layer. Of more kinds than ``MOST_PANELS``, the
    first are drawn, and the caption says so.

    Args:
        run: a run in which the method has made at least one decision.
    """
    shares = Shares(run)
    grids = np.stack([shares.layout.grid(shares.of(row)) for row in run.decisions])
    steps = [row["step"] for row in run.decisions]
    edges = [*steps, max(run.last_step, steps[-1] + 1)]  # a decision holds until the next one
    all_modules, num_layers = shares.layout.modules, len(shares.layout.layers)
    modules = all_modules[:MOST_PANELS]
    rows = -(-len(modules) // 2)
    height = rows * min(2.4, 0.7 + 0.14 * num_layers) + 0.5
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    grid_of_axes = figure.subplots(rows, 2, squeeze=False, sharex=True, sharey=True)
    for axes in grid_of_axes.flat[len(modules) :]:
        axes.set_visible(False)
    for column, (module, axes) in enumerate(zip(modules, grid_of_axes.flat, strict=False)):
        cells = grids[:, :, column].T
        mesh = axes.pcolormesh(edges, np.arange(num_layers + 1), cells, **shares.style)
        axes.set_title(module)
        axes.grid(False)
        _label_layers(axes, shares.layout, most=6)
        axes.xaxis.set_major_locator(MaxNLocator(3, integer=True))
    figure.supxlabel("step", size=9)
    figure.supylabel("layer", size=9)
    shares.colours(grid_of_axes, mesh, figure)
    which = "One panel for each kind of module"
    if len(all_modules) > len(modules):
        which = (
            f"One panel for each of the first {MOST_PANELS} of {len(all_modules)} kinds of module"
        )
    return Picture(
        name=f"{shares.name}_over_time",
        title=f"{shares.title} over time",
        caption=f"{which}; {counted(len(steps), 'decision')}, the first "
        f"after step {steps[0]}.{shares.note}",
        figure=figure,
    )
