"""AdaLoRA: share a falling budget of rank-1 components among all linears, by importance.

    y = W x + (alpha / R) B diag(lambda) A x
    b_t = floor(b_T + (b_0 - b_T) * (1 - (t - begin) / (end - begin))^3)

Component i is row i of A, column i of B and lambda_i. b_t is the budget at step t: the number of
components that all linears together keep. It falls from b_0 at step begin to b_T at step end.

The method decides every `adalora_every` steps from `adalora_begin` on: the b_t components of
highest score keep their lambda, and the lambda of all others becomes zero (equation 6). The score
of an entry is the smoothed |w * dL/dw| times its smoothed deviation; that of a component is the
score of lambda_i plus the mean over row i of A and the mean over column i of B
(`shared/triplets.py`). A and B of all components go on training, so a component may return. The
last choice comes when the fraction `adalora_final` of the run is left, and is final: the other
components lose A, B and lambda and are no longer computed. A linear may end without any component.

This implementation differs from the released code (github.com/QingruZhang/AdaLoRA, d10f5eb) and
PEFT:

- Importance is w * dL/dw at the same w. The released code and PEFT multiply the w after a step by
  the gradient from before that step.
- Exactly b_t components stay, those of lowest index among equal scores. This also holds where b_t
  is the number of all components, a case in which the released code and PEFT fail.
- The penalty is the paper's squared norm. `--adalora_preset released` takes the unsquared norm of
  the released code.
- Lambda has a learning rate of its own (`triplets.triplet_tensors`).

On the same parameters and gradients, decisions equal those of PEFT's `RankAllocator`
(`tests/methods/test_adalora.py`). Under ZeRO-3, PEFT's own AdaLoRA either raises an error or never
masks the fp32 master weights. In this project masked lambdas are zero in the master weights too
(`python benchmarks/peft_adalora.py`).

- **Optimizer state:** 8 bytes x trained entries; falls once, at the final choice.
- **Statistics:** 8 bytes x trained entries until the final choice.
- **Exports as:** PEFT LoRA of each linear's own rank (lambda in A), merged model or sparse delta.
- **Choose it when:** a total rank is given and you want its best distribution over linears.
- **Paper:** Zhang et al. 2023, arXiv:2303.10512.

Shapes: R rank, S sites (adapted linears).
"""

from dataclasses import dataclass
from functools import partial
from math import inf
from typing import Literal

import torch
from torch import Tensor

from sparse_lora_dist.methods.protocol.form import zeros
from sparse_lora_dist.methods.protocol.method import (
    Components,
    Decision,
    Method,
    MethodFactory,
    RunContext,
    Scores,
    Stats,
)
from sparse_lora_dist.methods.shared.schedules import cubic_budget
from sparse_lora_dist.methods.shared.top_k import places_of
from sparse_lora_dist.methods.shared.triplets import (
    WITHIN,
    mean_times_spread,
    orthogonality,
    smooth_pair,
    triplet,
    triplet_scores,
)


@dataclass(frozen=True, kw_only=True)
class AdaLoraOptions:
    """AdaLoRA: a falling budget of components over all sites"""

    adalora_preset: Literal["paper", "released"] = "paper"
    """Orthogonality penalty and initial values: paper (squared norms, summed over all matrices) or
    released (mean of the unsquared norms, with A and B drawn from N(0, 0.02^2) as in the authors'
    code)."""
    adalora_lambda_lr_factor: float | None = None
    """Learning-rate multiplier for lambda, above 0. null: 1 for preset released, otherwise
    sqrt(out_features / 3), with which a component moves as far per step as one of LoRA's."""
    adalora_target_rank: float | None = None
    """Average number of components kept per linear at the end, from 1 to --rank. null: two thirds
    of --rank."""
    adalora_begin: float = 0.1
    """Fraction of the run after which pruning of components begins, at least 0; adalora_begin +
    adalora_final must be below 1."""
    adalora_final: float = 0.2
    """Fraction of the run, at its end, in which only the components that were kept train, at least
    0; adalora_begin + adalora_final must be below 1."""
    adalora_every: int | None = None
    """Steps between two pruning decisions, at least 1. null: 1% of the run."""
    adalora_beta1: float = 0.85
    """Decay rate of the smoothed sensitivity |w * dL/dw| of each entry, in [0, 1)."""
    adalora_beta2: float = 0.85
    """Decay rate of the smoothed uncertainty, the deviation of the sensitivity from its smoothed
    value, in [0, 1)."""
    adalora_orthogonality: float = 0.1
    """Weight of the penalty that keeps A and B near orthonormal, at least 0; 0 turns it off."""

    def __post_init__(self) -> None:
        problems = []
        if self.adalora_target_rank is not None and self.adalora_target_rank < 1.0:
            problems.append(
                f"--adalora_target_rank must be at least 1, got {self.adalora_target_rank}"
            )
        begin, final = self.adalora_begin, self.adalora_final
        if begin < 0.0 or final < 0.0 or begin + final >= 1.0:
            problems.append(
                "--adalora_begin and --adalora_final must be at least 0 and their sum below 1, "
                f"got {begin} and {final}"
            )
        factor = self.adalora_lambda_lr_factor
        if factor is not None and not 0.0 < factor < inf:
            problems.append(f"--adalora_lambda_lr_factor must be above 0, got {factor}")
        if self.adalora_every is not None and self.adalora_every < 1:
            problems.append(f"--adalora_every must be at least 1, got {self.adalora_every}")
        for name in ("adalora_beta1", "adalora_beta2"):
            if not 0.0 <= getattr(self, name) < 1.0:
                problems.append(f"--{name} must be in [0, 1), got {getattr(self, name)}")
        if self.adalora_orthogonality < 0.0:
            problems.append(
                f"--adalora_orthogonality must be at least 0, got {self.adalora_orthogonality}"
            )
        if problems:
            raise ValueError("; ".join(problems))


def adalora(options: AdaLoraOptions, context: RunContext) -> Method:
    """Return the `Method` that describes AdaLoRA to training, planning and export.

    Args:
        options: Values of the --adalora options.
        context: Length and adapted linears of the run.

    Raises:
        ValueError: --adalora_target_rank asks for more components than the linears have, or the run
            is too short to prune in.
    """
    # Not before step 2: lambda starts at zero, so at step 1 every score is 0 and ties would decide.
    begin = max(1, round(options.adalora_begin * context.total_steps))
    end = context.total_steps - round(options.adalora_final * context.total_steps)
    first, last = budget_ends(options, context)
    problems = []
    if last > first:
        problems.append(
            f"--adalora_target_rank {options.adalora_target_rank} asks for {last} components, but "
            f"all linears together have {first}. Raise --rank, or lower --adalora_target_rank"
        )
    if begin >= end:
        problems.append(
            f"pruning would begin at step {begin} and end at step {end} of {context.total_steps}, "
            "which leaves no step to prune in. Raise --max_steps, or lower --adalora_begin or "
            "--adalora_final"
        )
    if problems:
        raise ValueError("; ".join(problems))
    every = options.adalora_every or max(1, context.total_steps // 100)

    def observe(stats: Stats, w: Tensor, grad: Tensor, step: int) -> Stats:
        beta1, beta2 = options.adalora_beta1, options.adalora_beta2
        return smooth_pair(stats, (w * grad).abs(), beta1=beta1, beta2=beta2)

    def decide(step: int, scores: Scores) -> Decision:
        budget = cubic_budget(step, begin=begin, end=end, first=first, last=last)
        kept = top_components(triplet_scores(scores), budget)
        return keep(scores, kept, final=step == end, log_values={"budget": float(budget)})

    released = options.adalora_preset == "released"
    return Method(
        name="adalora",
        form=partial(
            triplet,
            lambda_init=zeros,
            lr_factor=options.adalora_lambda_lr_factor,
            released=released,
        ),
        penalty=orthogonality(
            options.adalora_orthogonality, 2 * len(context.sites), released=released
        ),
        n_stats=2 if first > last else 0,
        observe=observe,
        score=mean_times_spread,
        observes_until=end,
        redraws=first == last,
        decides_at=lambda step: (
            first > last and (step == end or (begin < step < end and step % every == 0))
        ),
        decide=decide,
    )


def budget_ends(options: AdaLoraOptions, context: RunContext) -> tuple[int, int]:
    """Return how many components the whole model has at the start and at the end of pruning.

    Args:
        options: Values of the --adalora options.
        context: Adapted linears of the run.

    Returns:
        (number at the start, number at the end).
    """
    capacity = sum(site.rank for site in context.sites)
    if options.adalora_target_rank is None:
        return capacity, max(len(context.sites), capacity * 2 // 3)
    return capacity, round(options.adalora_target_rank * len(context.sites))


def top_components(scores: dict[str, Tensor], budget: int) -> dict[str, Tensor]:
    """Select the ``budget`` components of highest score over all sites; of equal scores, the first.

    Args:
        scores: Site name -> scores of its components, [R].
        budget: Number of components to select.

    Returns:
        Site name -> mask of its components, bool [R]; True means selected.
    """
    flat = torch.cat(list(scores.values()))
    kept = torch.zeros_like(flat, dtype=torch.bool)
    kept[flat.argsort(descending=True, stable=True)[:budget]] = True
    parts = kept.split([len(score_R) for score_R in scores.values()])
    return dict(zip(scores, parts, strict=True))


def keep(
    scores: Scores, kept: dict[str, Tensor], *, final: bool, log_values: dict[str, float]
) -> Decision:
    """Return the decision to keep some components and prune the others.

    Before the final decision, a pruned component has its lambda set to zero, but its A and B go on
    training and it may return. At the final decision it loses A, B and lambda for good and is no
    longer computed.

    Args:
        scores: Scores of the run; used to spread the masks over this rank's slices.
        kept: Site name -> mask of the components to keep, bool [R].
        final: True for the final decision.
        log_values: Numbers to log with the metrics of this step, by name.
    """
    kept_parts = {
        f"{site}.{name}": scores.spread(f"{site}.{name}", kept_R, by)
        for site, kept_R in kept.items()
        for name, by in WITHIN.items()
        if final or name == "lora_lambda"
    }
    components = {}
    for site, open_ones in places_of(kept).items():
        computed = open_ones if final else tuple(range(len(kept[site])))
        components[site] = Components(computed=computed, open=len(open_ones))
    if final:
        return Decision(live=kept_parts, components=components, log_values=log_values)
    zero = {name: ~part for name, part in kept_parts.items()}
    return Decision(zero=zero, components=components, log_values=log_values)


ADALORA = MethodFactory(
    options=AdaLoraOptions,
    build=adalora,
    summary="prunes components to a budget for the whole model",
    example="--adalora_every 1 --adalora_target_rank 2",
)
