"""Forecast of the fraction of adapter entries that are live at the start, at most and at the end.

The forecast builds the method for 8 linears of 200 x 200 and lets it make its decisions on random
scores. The small size is enough, because a method keeps the same fraction of rows, columns and
components in small linears as in large ones. Entries whose death depends on the data (SoRA's gates)
are counted as live.
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_lora_dist.methods.protocol.form import Site
from sparse_lora_dist.methods.protocol.method import (
    By,
    Decision,
    Method,
    MethodFactory,
    RunContext,
    Ties,
    trained_specs,
)

SITES, FEATURES, STEPS = 8, 200, 200
"""Size of the simulated run: number of linears, their in_features and out_features, and steps."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Live:
    """Fraction of a rank's entries that are live, for the rank with most live entries."""

    first: float
    """Live fraction before the first optimizer step."""
    peak: float
    """Highest live fraction of the run."""
    last: float
    """Live fraction after the last decision."""


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """Live entries of the simulated run, after each decision."""

    profiles: tuple[list[tuple[Tensor, int]], ...]
    """One list per decision. A list has one pair (counts, number) for all tensors of the same name
    and size. number: how many such tensors there are, 1 for a tensor that all linears share.
    counts, 1-D float32: for each entry, in how many of these tensors it is live."""
    birth_bytes: int
    """Bytes that the optimizer keeps per live entry for its birth step: 2, or 0 if all live entries
    share one birth step."""

    def on(self, world_size: int) -> Live:
        """Return the live fractions if the entries are sharded over ``world_size`` ranks.

        Each tensor is cut into contiguous shards, so the rank with most live entries can have far
        more than the average. Example: if a quarter of the components is open, all of them may lie
        on the first of four ranks.
        """
        fractions = [self._worst(profile, world_size) for profile in self.profiles]
        return Live(first=fractions[0], peak=max(fractions), last=fractions[-1])

    def _worst(self, profile: list[tuple[Tensor, int]], world_size: int) -> float:
        """Return the live fraction of the rank with most live entries."""
        live = torch.zeros(world_size)
        size = 0
        for counts, number in profile:
            share = -(-counts.numel() // world_size)
            padded = F.pad(counts, (0, share * world_size - counts.numel()))
            live += padded.view(world_size, share).sum(1)
            size += share * number
        return float(live.max()) / size


def forecast(factory: MethodFactory, options: object, context: RunContext) -> Forecast:
    """Simulate the method's decisions over a run, and record the live entries after each.

    A run of more than 200 steps is shortened to 200, unless the method's options are given in steps
    and do not fit into 200.

    Args:
        factory: builds the method.
        options: the method's options, an instance of its own dataclass.
        context: the sites, steps and warm-up of the run.
    """
    rank = max(site.rank for site in context.sites)
    side = max(FEATURES, rank)
    sites = tuple(
        Site(name=f"{i}", in_features=side, out_features=side, rank=rank) for i in range(SITES)
    )
    method, steps = _shortest(factory, options, context, sites)
    live = {
        name: torch.ones(spec.shape, dtype=torch.bool)
        for name, spec in trained_specs(method, sites).items()
    }
    births = {name: torch.zeros_like(mask, dtype=torch.int32) for name, mask in live.items()}
    profiles, aged = [], False
    for step in [0, *(s for s in range(1, steps + 1) if method.decides_at(s))]:
        if step > 0 or method.decides_at(0):
            _take(method.decide(step, _RandomScores(live, method, len(sites))), live, births, step)
        profiles.append(_profile(live))
        aged = aged or len({int(births[n][m].max()) for n, m in live.items() if m.any()}) > 1
        if method.observes_until is not None and step >= method.observes_until:
            break
    return Forecast(profiles=tuple(profiles), birth_bytes=2 * aged)


def _shortest(
    factory: MethodFactory, options: object, context: RunContext, sites: tuple[Site, ...]
) -> tuple[Method, int]:
    """Build the method for the simulated run.

    Returns:
        The method and the steps of its run: 200, or those of ``context`` if the method's options
        do not fit into 200.
    """
    for steps in (min(STEPS, context.total_steps), context.total_steps):
        try:
            short = replace(context, total_steps=steps, warmup_steps=0, sites=sites)
            return factory.build(options, short), steps
        except ValueError:  # options given in steps need a longer run
            continue
    return factory.build(options, context), context.total_steps


def _take(
    decision: Decision, live: dict[str, Tensor], births: dict[str, Tensor], step: int
) -> None:
    """Apply a decision: change the masks in ``live``, and set the birth step of new live entries in
    ``births``."""
    for name, mask in decision.live.items():
        new = mask.view_as(live[name])
        births[name][new & ~live[name]] = step
        live[name] = new


def _profile(live: Mapping[str, Tensor]) -> list[tuple[Tensor, int]]:
    """Return one list of ``Forecast.profiles`` for the masks ``live``, by tensor name."""
    masks = defaultdict(list)
    for name, mask in live.items():
        masks[name.rpartition(".")[2], mask.numel()].append(mask.flatten().float())
    return [(torch.stack(alike).sum(0), len(alike)) for alike in masks.values()]


class _RandomScores:
    """Implements ``Scores`` for tensors that are not sharded. The scores are random for live
    entries, and 0 for dead ones."""

    def __init__(self, live: Mapping[str, Tensor], method: Method, num_sites: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self._live = live
        self._values = {
            name: torch.rand(mask.shape, generator=generator) * mask for name, mask in live.items()
        }
        self.site_stats = torch.rand(
            method.n_site_stats, num_sites, dtype=torch.float64, generator=generator
        )

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: tuple(t.shape) for name, t in self._values.items()}

    def top_k(
        self, k: Mapping[str, int], by: Mapping[str, By], ties: Ties = "index"
    ) -> dict[str, Tensor]:
        masks = {}
        for name, count in k.items():
            lines = _lines(self._values[name], by[name])
            chosen = torch.zeros_like(lines, dtype=torch.bool)
            chosen.scatter_(1, lines.topk(count, dim=1).indices, True)
            masks[name] = (chosen.t() if by[name] == "column" else chosen).flatten()
        return masks

    def sums(self, by: Mapping[str, By]) -> dict[str, Tensor]:
        return {n: _lines(self._values[n], side).double().sum(1) for n, side in by.items()}

    def live(self, by: Mapping[str, By]) -> dict[str, Tensor]:
        return {n: _lines(self._live[n], side).long().sum(1) for n, side in by.items()}

    def spread(self, name: str, values: Tensor, by: By) -> Tensor:
        lines = values[:, None].expand_as(_lines(self._live[name], by))
        return (lines.t() if by == "column" else lines).flatten()


def _lines(t: Tensor, by: By) -> Tensor:
    """Return the tensor as a matrix, each of whose rows is one segment of it.

    Args:
        t: a tensor; axes after the first are flattened.
        by: what a segment is: a row, a column, or the whole tensor.
    """
    if by == "tensor":
        return t.reshape(1, -1)
    matrix = t.reshape(t.shape[0], -1)
    return matrix if by == "row" else matrix.t()
