"""Histograms of gates and of importances, read from the tensors of a checkpoint.

A gate or lambda is the trained factor of one rank-1 component of an adapter. The importance of an
adapter entry is the first of the running statistics that the method keeps of it.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np
from matplotlib.ticker import AutoLocator
from numpy.typing import NDArray

from sparse_lora_dist.checkpoint import SavedSlices
from sparse_lora_dist.report.run_data import RunData
from sparse_lora_dist.report.saved_steps import SavedStep
from sparse_lora_dist.report.style import Picture, lines, panels, plain_numbers

EDGES = np.arange(-24.0, 4.01, 0.2)
"""Edges of the bins for importances, from 1e-24 to 1e4, as base-10 logarithms. Values beyond the
edges are counted in the outermost bins."""


@dataclass
class Histogram:
    """Histogram of importances on a logarithmic scale; it begins empty."""

    counts: NDArray[np.int64] = field(default_factory=lambda: np.zeros(len(EDGES) - 1, np.int64))
    """1-D int64: number of entries in each bin of ``EDGES``, those with importance 0 left out."""
    zeros: int = 0
    """Number of entries with importance 0."""

    def add(self, values: NDArray[np.float32]) -> None:
        """Add the entries of one tensor to the counts.

        Tensors are added one at a time, because those of a large model do not fit into memory
        together.

        Args:
            values: importances of the tensor's entries, 1-D float32, none negative.
        """
        above = values[values > 0]
        powers = np.log10(above.astype(np.float64))
        self.counts += np.histogram(powers.clip(EDGES[0], EDGES[-1]), EDGES)[0]
        self.zeros += values.size - above.size


def gates(run: RunData) -> Picture | None:
    """Plot histograms of the gates or lambdas of all rank-1 components of all adapters.

    Args:
        run: the run; its readable checkpoints are used.

    Returns:
        A figure with a line each for the first, the middle and the last checkpoint that has gates
        or lambdas; None if none has.
    """
    having = [saved for saved in run.checkpoints if any(_vectors(saved.manifest))]
    if not having:
        return None
    chosen = {s.step: gate_values(s) for s in (having[0], having[len(having) // 2], having[-1])}
    every = np.abs(np.concatenate([*chosen.values()]))
    largest = float(every[np.isfinite(every)].max(initial=0.0)) or 1.0
    bins = np.linspace(-largest, largest, 42)
    figure, (axes,) = panels(height=3.0)
    for (step, values), line in zip(chosen.items(), lines(len(chosen)), strict=True):
        counts, _ = np.histogram(values[values != 0], bins)
        label = f"step {step}: {(values == 0).sum():,} zero"
        axes.stairs(counts, bins, color=line.colour, label=label)
    kind = next(_vectors(having[0].manifest)).rpartition(".")[2].removeprefix("lora_")
    axes.xaxis.set_major_locator(AutoLocator())
    scale = "log" if any(v.any() for v in chosen.values()) else "linear"
    axes.set(xlabel=kind, ylabel="components", yscale=scale)  # those held near zero tower
    plain_numbers(axes)
    figure.legend(loc="outside lower center", ncols=2)
    return Picture(
        name="gates",
        title=f"{kind.capitalize()} of the components",
        caption=f"Values of all {len(values):,} components. Exact zeros are counted in the "
        "legend and not drawn.",
        figure=figure,
    )


def gate_values(saved: SavedStep) -> NDArray[np.float32]:
    """Return the gates or lambdas of all sites of a checkpoint as one 1-D float32 array, in the
    order of the checkpoint's manifest."""
    slices = _open(saved)
    names = _vectors(saved.manifest)
    return np.concatenate([_whole(slices, saved, "master", name) for name in names])


def importance(run: RunData) -> Picture | None:
    """Plot histograms of the importance of all adapter entries.

    A kind of tensor, such as A of all adapters, has one line.

    Args:
        run: the run; its readable checkpoints are used.

    Returns:
        A figure for the last checkpoint that stores statistics, or None if there is none.
    """
    saved = next((s for s in reversed(run.checkpoints) if _has_statistics(s.manifest)), None)
    if saved is None:
        return None
    figure, (axes,) = panels()
    found = importances(saved)
    for (kind, histogram), line in zip(found.items(), lines(len(found)), strict=True):
        axes.stairs(histogram.counts, EDGES, color=line.colour, label=kind.removeprefix("lora_"))
    seen = np.flatnonzero(sum(h.counts for h in found.values()))
    if len(seen):
        axes.set_xlim(EDGES[seen[0]] - 0.5, EDGES[seen[-1] + 1] + 0.5)
    axes.set(xlabel="importance", ylabel="entries", yscale="log")
    plain_numbers(axes)
    axes.xaxis.set_major_formatter(lambda power, place: f"1e{power:g}")
    figure.legend(loc="outside lower center", ncols=3)
    zeros = sum(h.zeros for h in found.values())
    without = f" {zeros:,} entries with importance 0 are not drawn." if zeros else ""
    outer = any(h.counts[0] or h.counts[-1] for h in found.values())
    beyond = " Values below 1e-24 or above 1e4 are counted in the outermost bins." if outer else ""
    return Picture(
        name="importance",
        title="Importance",
        caption=f"Importance of every adapter entry at step {saved.step}, from the method's "
        f"statistics in the last checkpoint that stores them.{without}{beyond}",
        figure=figure,
    )


def importances(saved: SavedStep) -> Mapping[str, Histogram]:
    """Return the histograms of a checkpoint's importances, one for each kind of tensor.

    Args:
        saved: a checkpoint that stores statistics.

    Returns:
        Kind of tensor, such as "lora_a" or "lora_b" -> histogram of these tensors of all adapters.
    """
    slices, found = _open(saved), dict[str, Histogram]()
    for name in _adapter_tensors(saved.manifest):
        values = _whole(slices, saved, "stat0", name)
        found.setdefault(name.rpartition(".")[2], Histogram()).add(values)
    return found


def _adapter_tensors(manifest: Mapping[str, Any]) -> Iterator[str]:
    """Yield the names of all trained tensors of adapters that a checkpoint's manifest lists; none
    if the manifest is empty."""
    sites = manifest.get("sites", {"pieces": ()})["pieces"]
    yield from (n for n in manifest.get("tensors", ()) if n.rpartition(".")[0] in sites)


def _vectors(manifest: Mapping[str, Any]) -> Iterator[str]:
    """Yield the names of the adapters' tensors that hold one number per rank-1 component: gates or
    lambdas."""
    shapes = manifest.get("tensors", {})
    # Vectors of other forms, such as the values on a support (SHiRA), are no gates of components.
    between = (name for name in _adapter_tensors(manifest) if ".lora_" in name)
    yield from (name for name in between if len(shapes[name]) == 1)


def _has_statistics(manifest: Mapping[str, Any]) -> bool:
    """Return True if the checkpoint of this manifest stores running statistics of the entries.

    It does not if the method keeps none, or has freed them after its last decision.
    """
    return bool(manifest) and not manifest["ended"] and manifest["description"]["statistics"][0] > 0


def _open(saved: SavedStep) -> SavedSlices:
    return SavedSlices.of(saved.path, saved.manifest)


def _whole(slices: SavedSlices, saved: SavedStep, key: str, name: str) -> NDArray[np.float32]:
    """Read a whole tensor of a checkpoint, put together from the files of all ranks.

    Args:
        slices: the open files of the checkpoint.
        saved: the checkpoint.
        key: what is stored of the tensor's entries: "master" for the fp32 values, "stat0" for the
            first running statistic.
        name: name of the tensor, "site.tensor".

    Returns:
        One number per entry, 1-D float32.
    """
    size = prod(saved.manifest["tensors"][name])
    return slices.entries(key, name, 0, size).numpy()
