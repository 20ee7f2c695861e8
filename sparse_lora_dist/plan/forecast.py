"""Forecast of the fraction of adapter entries that are live at the start of a run, at its peak and
at its end. A live entry is one that the optimizer steps and keeps moments for; others are dead.

The forecast builds the method for 8 linears of 200 x 200 and lets it make its decisions from
random importance scores. A decision says which entries are live from that step on. The small size
is enough, because a method keeps the same fraction of rows, columns and components in small linears
as in large ones. Entries whose death depends on the data (SoRA's gates) are counted as live.
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import ceil
from typing import Any

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
"""Size of the simulated run: number of linears, in_features and out_features of each, and number of
optimizer steps."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Live:
    """Fraction of the adapter entries on one rank that are live, for the rank with most live
    entries."""

    first: float
    """Live fraction before the first optimizer step."""
    peak: float
    """Highest live fraction over the run."""
    last: float
    """Live fraction after the last decision."""


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """Live entries of the simulated run at its start and after each decision."""

    profiles: tuple[list[tuple[Tensor, int]], ...]
    """One list for the start and one per later decision. A list has one pair (counts, number) for
    all tensors of the same name and size, such as "lora_a" of all linears. number: how many such
    tensors there are, 1 for a tensor that all linears share. counts, 1-D float32, one value per
    entry of such a tensor: in how many of these tensors the entry at this position is live."""
    birth_bytes: int
    """Bytes that the optimizer keeps per live entry for its birth step, the optimizer step after
    which the entry came to life: 2, or 0 if all live entries share one birth step."""

    def on(self, world_size: int) -> Live:
        """Return the live fractions if the entries are sharded over ``world_size`` ranks.

        Each tensor is cut into contiguous shards, so the rank with most live entries can have far
        more than the average. Example: if a quarter of the rank-1 components of each linear is
        live, all of them may lie on the first of four ranks.
        """
        fractions = [self._worst(profile, world_size) for profile in self.profiles]
        return Live(first=fractions[0], peak=max(fractions), last=fractions[-1])

    def _worst(self, profile: list[tuple[Tensor, int]], world_size: int) -> float:
        """Return the live fraction, from 0 to 1, of the rank with most live entries; ``profile`` is
        one element of ``profiles``."""
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
        factory: builds the method from options and context, an entry of ``METHODS``.
        options: the method's options, an instance of its own dataclass of options.
        context: facts of the run that methods are built from: the linears that carry adapters, the
            number of steps and of warm-up steps.

    Returns:
        The live entries at the start and after each decision, and the bytes of birth steps.
    """
    rank = max(site.rank for site in context.sites)
    side = max(FEATURES, rank)
    sites = tuple(
        Site(name=f"{i}", in_features=side, out_features=side, rank=rank) for i in range(SITES)
    )
    method, steps, sites = _shortest(factory, options, context, sites)
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
) -> tuple[Method, int, tuple[Site, ...]]:
    """Build the method for the simulated run.

    Args:
        factory: builds the method.
        options: the method's options.
        context: the facts of the planned run.
        sites: the linears of the simulated run.

    Returns:
        The method; the number of steps that it was built for, at most 200, or that of ``context``
        if the method's options do not fit into 200; and the linears that it was built for, which
        are the first of ``context`` if the options do not fit ``sites``.
    """
    for linears in (sites, context.sites[: len(sites)]):
        few = _for_fewer(factory, options, len(linears) / len(context.sites))
        for steps in (min(STEPS, context.total_steps), context.total_steps):
            short = replace(context, total_steps=steps, warmup_steps=0, sites=linears)
            try:
                return factory.build(few, short), steps, linears
            except ValueError as error:  # options given in steps need a longer run
                reason = error
    raise reason


def _for_fewer(factory: MethodFactory, options: Any, share: float) -> Any:
    """Return the options for a model that has ``share`` times as many linears."""
    totals = {name: getattr(options, name) for name in factory.totals}
    return replace(options, **{n: ceil(v * share) for n, v in totals.items() if v is not None})


def _take(
    decision: Decision, live: dict[str, Tensor], births: dict[str, Tensor], step: int
) -> None:
    """Apply a decision to the masks in ``live`` and to the birth steps in ``births``.

    Args:
        decision: the new masks by tensor name; a tensor without a new mask keeps its own.
        live: bool mask of the live entries of each tensor, by its name; changed in place.
        births: int32 birth step of each entry, by tensor name; set to ``step``, in place, for
            entries that were dead before this decision and are live after it.
        step: optimizer step of the decision.
    """
    for name, mask in decision.live.items():
        new = mask.view_as(live[name])
        births[name][new & ~live[name]] = step
        live[name] = new


def _profile(live: Mapping[str, Tensor]) -> list[tuple[Tensor, int]]:
    """Return how often each entry is live in tensors of the same kind, as in ``Forecast.profiles``.

    Args:
        live: name of a tensor -> bool mask of its live entries.

    Returns:
        For each kind of tensor (same name within a site, same size): in how many of them the entry
        at each position is live, fp32, 1-D; and how many such tensors there are.
    """
    masks = defaultdict(list)
    for name, mask in live.items():
        masks[name.rpartition(".")[2], mask.numel()].append(mask.flatten().float())
    return [(torch.stack(alike).sum(0), len(alike)) for alike in masks.values()]


class _RandomScores:
    """Random importance scores, from which a method makes its decisions (protocol ``Scores``).

    The tensors are not sharded. Live entries have a random score in [0, 1), dead ones have 0.
    """

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
    """Return the tensor as a matrix whose rows are its rows, its columns, or the whole tensor.

    Args:
        t: a tensor; axes after the first are flattened.
        by: "row" or "column": a row of the result for each row or column of ``t``. "tensor": the
            result has a single row with all entries.
    """
    if by == "tensor":
        return t.reshape(1, -1)
    matrix = t.reshape(t.shape[0], -1)
    return matrix if by == "row" else matrix.t()
