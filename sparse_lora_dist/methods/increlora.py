"""IncreLoRA: start every linear at a low rank, and open components where they matter most.

    y = W x + (alpha / R) B diag(lambda) A x
    score of a linear = mean_t * spread_t           (smoothed importance and its deviation)

Component i is row i of A, column i of B and lambda_i. R is `--rank`, the largest number of
components that a linear can have.

The method decides every `increlora_every` steps between `increlora_begin` and `increlora_end`. The
linears of highest score, `increlora_modules` of them, open `increlora_pieces` components each,
until the ranks add up to the budget; the last growth opens what is left of it. What a linear cannot
take because it has R components goes to the linear of next highest score.

- Advance learning: the next component of a linear, the reserve, trains before it is opened. Its row
  of A and column of B are trained while its lambda is held at 1e-5. When the budget is reached,
  reserves are set to zero.
- Own schedule: the learning rate of an entry that begins to train during the run warms up from
  zero at that step, then decays to the end of the run. A and B of a component begin to train when
  it becomes the reserve or is opened, lambda when it is opened.

This implementation differs from the paper:

- The default score of a linear is the sum of AdaLoRA's triplet scores over its open components. It
  is computed from gradients reduced over all ranks, so it does not depend on the number of ranks.
  The paper's score, |dW * dL/dW|, is `--increlora_score delta`, and does depend on it
  (`triplets.delta_sensitivity`).
- Lambda has a learning rate of its own (`triplets.triplet_tensors`).

With one component per linear at first, a short run needs a higher `--learning_rate` than LoRA.

Preset `released` follows github.com/FeiyuZhang98/IncreLoRA (51a2d73):

- The scale is alpha / open components, so the update jumps when components open.
- A linear that grows opens `increlora_pieces` components even if fewer are left in the budget, and
  all linears that tie with the last one grow. So the budget may be exceeded; the reserves then go
  on training.
- The first growth is at step 2 x `increlora_every`.
- The delta score is divided by sqrt(O I), which favours large linears.
- The penalty is that of `triplets.released_penalty`.
- A and B start at N(0, 0.02^2).

Unlike in that code, a linear can have at most R components.

- **Optimizer state:** 8 bytes x live entries (those that train); grows from the start rank to the
  target rank, and at the default target stays below LoRA's of the same `--rank`.
- **Statistics:** 8 bytes x trained entries until growth ends; none with `--increlora_score delta`.
- **Exports as:** PEFT LoRA of each linear's own rank (lambda in A), merged model or sparse delta.
- **Choose it when:** few linears matter, or memory at the peak counts: with `--increlora_score
  delta` there are no statistics, and the optimizer state stays below LoRA's of the same `--rank`.
- **Paper:** Zhang et al. 2023, arXiv:2308.12043.

Shapes: T tokens, I in_features, O out_features, R rank, S sites (adapted linears).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from math import ceil, inf
from sys import float_info
from typing import Any, Literal

import torch
from torch import Tensor

from sparse_lora_dist.methods.protocol.form import alpha_over_capacity
from sparse_lora_dist.methods.protocol.method import (
    Components,
    Decision,
    Method,
    MethodFactory,
    RunContext,
    Scores,
    Stats,
    as_preset,
)
from sparse_lora_dist.methods.shared import triplets
from sparse_lora_dist.methods.shared.growth import Growth
from sparse_lora_dist.methods.shared.triplets import WITHIN

RESERVE_LAMBDA = 1e-5
"""Initial lambda of components that are not open. It is small compared with trained lambdas (1e-2
to 1e-1), but lets gradients reach the A and B of the next component to open."""

GROWTHS = 10
"""Default number of growth updates between begin and end."""

PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"increlora_begin": 0.1, "increlora_score": "triplet"},
    "released": {"increlora_score": "delta"},
}

COUNTS = ("start_rank", "target_rank", "budget", "modules", "pieces", "every")


@dataclass(frozen=True, kw_only=True)
class IncreLoraOptions:
    """IncreLoRA: ranks grow where they matter"""

    increlora_preset: Literal["paper", "released"] = "paper"
    """Preset for the increlora options that are left unset: "paper", or "released" (the authors'
    code, which rescales the update at growth and may overshoot the budget)."""
    increlora_start_rank: int = 1
    """Number of open components per linear at the start, at least 1."""
    increlora_target_rank: float | None = None
    """Average number of open components per linear at the end, at least 1. null: increlora_budget /
    number of linears if increlora_budget is given, otherwise half of --rank, or
    increlora_start_rank if that is more."""
    increlora_budget: int | None = None
    """Total number of open components of the model at the end, at least 1; cannot be combined
    with increlora_target_rank. null: increlora_target_rank x number of linears."""
    increlora_modules: int | None = None
    """Number of linears that grow per update, at least 1. null: the smallest number that reaches
    the target by increlora_end."""
    increlora_pieces: int | None = None
    """Number of components that each growing linear opens per update, at least 1. null: half of the
    average rank at the end, or more if the target needs it."""
    increlora_every: int | None = None
    """Steps between two growth updates, at least 1. null: a tenth of the steps between
    increlora_begin and increlora_end."""
    increlora_begin: float | None = None
    """Fraction of the run before growth begins, at least 0 and below increlora_end. null: 0.1 for
    preset paper; with released the first growth is at step 2 x increlora_every."""
    increlora_end: float = 0.6
    """Fraction of the run by which growth ends, above increlora_begin and at most 1. Growth ends
    later if increlora_modules is set too low to reach the target by then."""
    increlora_warmup: int | None = None
    """Warm-up steps of the entries that begin to train during the run, at least 0. null:
    increlora_every."""
    increlora_lambda_lr_factor: float | None = None
    """Learning-rate multiplier for lambda, above 0. null: 1 for preset released, otherwise
    sqrt(out_features / 3), with which a component moves as far per step as one of LoRA's."""
    increlora_beta1: float = 0.85
    """Decay rate of the smoothed importance that linears are scored by, in [0, 1)."""
    increlora_beta2: float = 0.85
    """Decay rate of the smoothed deviation of the importance from its smoothed value, in [0, 1)."""
    increlora_orthogonality: float = 0.1
    """Weight of the penalty that keeps A and B near orthonormal, at least 0; 0 turns it off."""
    increlora_score: Literal["triplet", "delta"] | None = None
    """Importance of a linear: triplet (sum over the scores of its open components) or delta (|dW *
    dL/dW| over the whole update). null: triplet for preset paper, delta for released."""

    def __post_init__(self) -> None:
        problems = self._outside("at least 1", 1, inf, *COUNTS)
        problems += self._outside("at least 0", 0, inf, "warmup", "orthogonality")
        problems += self._outside("above 0", float_info.min, inf, "lambda_lr_factor")
        problems += self._outside("in [0, 1)", 0, 1, "beta1", "beta2")
        begin = as_preset(self, self.increlora_preset, PRESETS).increlora_begin
        if not 0.0 <= (begin or 0.0) < self.increlora_end <= 1.0:
            problems.append(
                "--increlora_begin and --increlora_end must satisfy 0 <= begin < end <= 1, "
                f"got {begin} and {self.increlora_end}"
            )
        if self.increlora_target_rank is not None and self.increlora_budget is not None:
            problems.append(
                "--increlora_target_rank and --increlora_budget both set the size at the end, got "
                f"{self.increlora_target_rank} and {self.increlora_budget}. Give one of them"
            )
        if problems:
            raise ValueError("; ".join(problems))

    def _outside(self, bound: str, low: float, high: float, *names: str) -> list[str]:
        values = {name: getattr(self, f"increlora_{name}") for name in names}
        return [
            f"--increlora_{name} must be {bound}, got {value}"
            for name, value in values.items()
            if value is not None and not low <= value < high
        ]


def planned(options: IncreLoraOptions, context: RunContext) -> Growth:
    """Return the growth schedule that the options ask for in this run.

    Args:
        options: Values of the --increlora options, those of the preset filled in.
        context: Length and adapted linears of the run.

    Raises:
        ValueError: The growth does not fit the run; the message gives every reason.
    """
    total, sites = context.total_steps, len(context.sites)
    begin, end, start = options.increlora_begin, options.increlora_end, options.increlora_start_rank
    average = options.increlora_target_rank or max(
        float(start), sum(site.rank for site in context.sites) / sites / 2
    )
    budget = options.increlora_budget or round(average * sites)
    every = options.increlora_every or max(1, int((end - (begin or 0.0)) * total / GROWTHS))
    # Not at step 1, where lambda is zero and the loss gives A and B no gradient; not at the last
    # step, or the components that it opens never train.
    begins = every if begin is None else max(1, round(begin * total))
    first = (begins // every + 1) * every
    growths = max(1, (min(round(end * total), total - 1) - first) // every + 1)
    needed = max(0, budget - start * sites)
    components = options.increlora_pieces or max(
        1, round(budget / sites / 2), ceil(needed / (growths * sites))
    )
    growth = Growth(
        sites=context.sites,
        start=start,
        budget=budget,
        modules=options.increlora_modules or max(1, ceil(needed / (growths * components))),
        components=components,
        every=every,
        first=first,
        overshoots=options.increlora_preset == "released",
    )
    if problems := growth.misfits(total):
        raise ValueError("; ".join(problems))
    return growth


def increlora(options: IncreLoraOptions, context: RunContext) -> Method:
    """Return the `Method` that describes IncreLoRA to training, planning and export.

    Args:
        options: Values of the --increlora options.
        context: Length and adapted linears of the run.

    Raises:
        ValueError: The options do not fit the run; the message gives every reason.
    """
    options = as_preset(options, options.increlora_preset, PRESETS)
    growth = planned(options, context)
    released, warmup = growth.overshoots, options.increlora_warmup
    by_delta = growth.needed > 0 and options.increlora_score == "delta"
    by_component = growth.needed > 0 and options.increlora_score == "triplet"
    smooth = partial(
        triplets.smooth_pair, beta1=options.increlora_beta1, beta2=options.increlora_beta2
    )

    def observe(stats: Stats, w: Tensor, grad: Tensor, step: int) -> Stats:
        return smooth(stats, (w * grad).abs())

    def observe_sites(stats_KS: Tensor, probes_S: Tensor) -> Tensor:
        return torch.stack(smooth((stats_KS[0], stats_KS[1]), probes_S))

    def decide(step: int, scores: Scores) -> Decision:
        if step == 0:
            return opened(growth, scores, [growth.start] * len(growth.sites))
        open_S = open_components(growth, scores)
        if sum(open_S) >= growth.budget:  # ties let the released preset reach it early
            return Decision(log_values={"budget": float(sum(open_S))})
        score_S = delta_scores(scores) if by_delta else component_scores(growth, scores, open_S)
        return opened(growth, scores, growth.grown(open_S, score_S))

    return Method(
        name="increlora",
        notes=growth.notes(),
        form=partial(
            triplets.triplet,
            lambda_init=partial(first_lambda, start=growth.start),
            lr_factor=options.increlora_lambda_lr_factor,
            released=released,
            scale=alpha_over_open if released else alpha_over_capacity,
        ),
        penalty=triplets.orthogonality(
            options.increlora_orthogonality, 2 * len(growth.sites), released=released
        ),
        n_stats=2 if by_component else 0,
        observe=observe,
        score=triplets.mean_times_spread,
        probe=partial(triplets.delta_sensitivity, power=0.5 if released else 1.0)
        if by_delta
        else None,
        n_site_stats=2 if by_delta else 0,
        observe_sites=observe_sites if by_delta else None,
        observes_until=growth.last,
        decides_at=lambda step: step == 0 or growth.at(step),
        decide=decide,
        redraws=growth.needed == 0,
        newborn_warmup=growth.every if warmup is None else warmup,
        newborn_restarts=True,
    )


def first_lambda(t: Tensor, generator: torch.Generator, *, start: int) -> None:
    """Fill ``t``, lambda of a site [R], in place with its initial values.

    They are 0 for the components that are open from the start, and RESERVE_LAMBDA for the others.

    Args:
        t: Tensor to fill.
        generator: Unused; every ``TensorSpec.init`` has this argument.
        start: Number of components that are open from the start.
    """
    t.fill_(RESERVE_LAMBDA)[:start] = 0.0


def opened(growth: Growth, scores: Scores, open_S: Sequence[int]) -> Decision:
    """Return the decision that makes ``open_S[i]`` components of site i open.

    All entries of open components are live, i.e. the optimizer steps them. The next component is
    the reserve: its row of A and column of B are live, but its lambda is not. There is no reserve
    at a site without a free component, nor once the budget is reached exactly: the decision that
    reaches it makes the reserves dead, which sets them to zero, and also sets every lambda that was
    never live to zero.

    Example: with rank 4 and 2 open components, the live masks are 1 1 1 0 for A and B, and 1 1 0 0
    for lambda.

    Args:
        growth: Growth schedule of the run.
        scores: Scores of the run; used to spread the masks over this rank's slices.
        open_S: Number of open components of each site.
    """
    full = sum(open_S) == growth.budget
    live, zero, components = {}, {}, {}
    for site, num_open in zip(growth.sites, open_S, strict=True):
        computed = num_open if full else min(num_open + 1, site.rank)
        moving = {"lora_a": computed, "lora_b": computed, "lora_lambda": num_open}
        for tensor, by in WITHIN.items():
            name = f"{site.name}.{tensor}"
            live[name] = scores.spread(name, torch.arange(site.rank) < moving[tensor], by)
        if full:
            name = f"{site.name}.lora_lambda"
            zero[name] = ~live[name]
        components[site.name] = Components(computed=tuple(range(computed)), open=num_open)
    return Decision(
        live=live, zero=zero, components=components, log_values={"budget": float(sum(open_S))}
    )


def open_components(growth: Growth, scores: Scores) -> list[int]:
    """Return the number of open components of each site: those whose lambda is live.

    A live entry is one that the optimizer steps. Components open in ascending order, so the number
    tells which are open. All ranks must call it.

    Args:
        growth: Growth schedule of the run.
        scores: Scores of the run.
    """
    names = [f"{site.name}.lora_lambda" for site in growth.sites]
    live = scores.live(dict.fromkeys(names, "row"))
    return list(map(int, torch.stack([live[name].sum() for name in names]).tolist()))


def component_scores(growth: Growth, scores: Scores, open_S: Sequence[int]) -> list[float]:
    """Return the sum of the triplet scores of each site's open components. All ranks must call it.

    Args:
        growth: Growth schedule of the run.
        scores: Scores of the run.
        open_S: Number of open components of each site.

    Returns:
        One score per site, equal on all ranks.
    """
    of = triplets.triplet_scores(scores)
    sums = [of[s.name][:n].sum() for s, n in zip(growth.sites, open_S, strict=True)]
    return [float(x) for x in torch.stack(sums).tolist()]


def delta_scores(scores: Scores) -> list[float]:
    """Return the score of each site: smoothed |dW * dL/dW| times its smoothed deviation.

    Raises:
        FloatingPointError: A score is NaN or infinite.
    """
    mean_S, spread_S = scores.site_stats
    score_S = mean_S * spread_S
    if not torch.isfinite(score_S).all():
        raise FloatingPointError("importance scores contain NaN or infinity")
    return [float(score) for score in score_S]


def alpha_over_open(alpha: float, capacity: int, open_components: int) -> float:
    """Return alpha / (open_components + 1e-5), the scale of a site in the authors' code.

    The delta therefore shrinks when a component opens.

    Args:
        alpha: Value of --alpha.
        capacity: Ignored.
        open_components: Number of components that are open now.
    """
    return alpha / (open_components + 1e-5)


INCRELORA = MethodFactory(
    options=IncreLoraOptions,
    build=increlora,
    summary="opens components where they matter, up to a budget",
    example="--increlora_every 2 --increlora_target_rank 2",
    totals=("increlora_budget", "increlora_modules"),
)
