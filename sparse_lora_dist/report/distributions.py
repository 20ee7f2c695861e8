"""Figures of how gates and importances are spread, from the tensors of a checkpoint."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np
from matplotlib.ticker import AutoLocator
from numpy.typing import NDArray

from sparse_lora_dist.checkpoint import SavedSlices
from sparse_lora_dist.report.run_data import RunData
from sparse_lora_dist.report.saved_steps import Saved
from sparse_lora_dist.report.style import Picture, lines, panels, plain_numbers

EDGES = np.arange(-24.0, 4.01, 0.2)
"""Of importance, in powers of ten; the outer bins have what lies beyond too."""


@dataclass
class Histogram:
    """Entries by the power of ten of their importance; those that have none apart."""

    counts: NDArray[np.int64] = field(default_factory=lambda: np.zeros(len(EDGES) - 1, np.int64))
    zeros: int = 0

    def add(self, values: NDArray[np.float32]) -> None:
        """One tensor at a time: a large model's do not fit in memory together."""
        above = values[values > 0]
        powers = np.log10(above.astype(np.float64))
        self.counts += np.histogram(powers.clip(EDGES[0], EDGES[-1]), EDGES)[0]
        self.zeros += values.size - above.size


def gates(run: RunData) -> Picture | None:
    """Values of what a method puts between A and B of every component, at the first, a middle and
    the last checkpoint; None where it has no such."""
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
    axes.set(xlabel=kind, ylabel="components", yscale="log")  # those held near zero tower
    plain_numbers(axes)
    figure.legend(loc="outside lower center", ncols=2)
    return Picture(
        name="gates",
        title=f"{kind.capitalize()} of the components",
        caption=f"All {len(values):,} components; what is exactly zero is counted below and "
        "not drawn.",
        figure=figure,
    )


def gate_values(saved: Saved) -> NDArray[np.float32]:
    """Of all sites, one after the other."""
    slices = _open(saved)
    names = _vectors(saved.manifest)
    return np.concatenate([_whole(slices, saved, "master", name) for name in names])


def importance(run: RunData) -> Picture | None:
    """The first running statistic of every entry, by tensor; None where no checkpoint has any."""
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
    without = f"; the {zeros:,} that have none (zero) are left out" if zeros else ""
    outer = any(h.counts[0] or h.counts[-1] for h in found.values())
    beyond = " What is below 1e-24 or above 1e4 is counted at that end." if outer else ""
    return Picture(
        name="importance",
        title="Importance",
        caption=f"Running importance of every entry at step {saved.step}, the last checkpoint that "
        f"has it{without}.{beyond}",
        figure=figure,
    )


def importances(saved: Saved) -> Mapping[str, Histogram]:
    """By kind of tensor: lora_a, lora_b ..."""
    slices, found = _open(saved), dict[str, Histogram]()
    for name in _adapter_tensors(saved.manifest):
        values = _whole(slices, saved, "stat0", name)
        found.setdefault(name.rpartition(".")[2], Histogram()).add(values)
    return found


def _adapter_tensors(manifest: Mapping[str, Any]) -> Iterator[str]:
    """Names of those that a method decides on; nothing of a damaged checkpoint."""
    sites = manifest.get("sites", {"pieces": ()})["pieces"]
    yield from (n for n in manifest.get("tensors", ()) if n.rpartition(".")[0] in sites)


def _vectors(manifest: Mapping[str, Any]) -> Iterator[str]:
    shapes = manifest.get("tensors", {})
    # Others' vectors, values on a support say, stand between no A and B.
    between = (name for name in _adapter_tensors(manifest) if ".lora_" in name)
    yield from (name for name in between if len(shapes[name]) == 1)


def _has_statistics(manifest: Mapping[str, Any]) -> bool:
    """Memory of statistics is given back after the last decision, and then they are not saved."""
    return bool(manifest) and not manifest["ended"] and manifest["description"]["statistics"][0] > 0


def _open(saved: Saved) -> SavedSlices:
    return SavedSlices.of(saved.path, saved.manifest)


def _whole(slices: SavedSlices, saved: Saved, key: str, name: str) -> NDArray[np.float32]:
    size = prod(saved.manifest["tensors"][name])
    return slices.entries(key, name, 0, size).numpy()
