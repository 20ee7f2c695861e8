"""SoRA: give every rank-1 component a gate, and drive gates to exactly zero by soft thresholding.

    y = W x + (alpha / R) B diag(g) A x
    g <- g - clamp(g, -xi, xi)              xi = (learning rate of the gates) * lambda

g are the R gates of a linear. The second line ends each optimizer update of a gate: it is the
proximal step of lambda * |g|_1.

The method decides at every step which gates become zero, and every `sora_every` steps which
components are open: those whose gate is not zero. A gate at zero still gets a gradient, so it may
open again, unless `sora_reopen` is false. Its row of A and column of B get none. `--weight_decay`
does not hold for gates. If `sora_lambdas` has several values, the run is cut into as many equal
stages of rising lambda (the paper's sparsifying schedule). Each stage has its own learning-rate
schedule, a checkpoint and a line in `stages.jsonl`.

Adam divides the gradient by its own size, but the threshold is not divided. So threshold `exact`
does not solve an L1 problem: lambda is in the units of Adam's update, and a gate shrinks while
Adam's direction m / sqrt(v) for it is below lambda. The direction is about 1, for all components
alike, as long as B grows from zero. Threshold `scaled` divides the threshold too, and solves the L1
problem. Results depend on lambda, so compare several values.

This implementation differs from the released code (github.com/TsinghuaC3I/SoRA, c275ac2) in these
points. Preset `released` follows that code in all of them:

- The threshold of the released code is lambda itself, without the learning rate.
- Its thresholding sets all gates with xi < |g| < 2 xi to zero too, and leaves |g| = xi where it is.
- It adds the gradient of an L1 term to that of the loss.
- From the second stage on its learning rate is 0.

Two more facts about the released code: its Adam has `adam_eps` 1e-6, which the preset does not set,
and it never drops a component from forward, which `--sora_reopen false` does here.

- **Optimizer state:** 8 bytes x trained entries; falls as components close with `--sora_reopen
  false`.
- **Statistics:** none.
- **Exports as:** PEFT LoRA of the open components (gates in B), merged model or sparse delta.
- **Choose it when:** you want a curve of rank against quality from one run.
- **Paper:** Ding et al. 2023, arXiv:2311.11696.

Shapes: T tokens, I in_features, O out_features, R rank.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import inf
from typing import Any, Literal

import torch
from torch import Tensor

from sparse_lora_dist.methods.protocol.form import (
    Form,
    Project,
    Site,
    Tensors,
    TensorSpec,
    Update,
    low_rank_pair,
)
from sparse_lora_dist.methods.protocol.method import (
    By,
    Components,
    Decision,
    Method,
    MethodFactory,
    RunContext,
    Scores,
    Stats,
    as_preset,
    site_names,
)
from sparse_lora_dist.methods.shared.schedules import stage_at, warmed_up_stages
from sparse_lora_dist.methods.shared.top_k import places_of

WITHIN: dict[str, By] = {"lora_a": "row", "lora_b": "column", "lora_gate": "row"}
"""{short tensor name: which part of the tensor belongs to one component}: component i has row i of
A, column i of B and gate i."""

TRAVEL = 2.0
"""Distance that the default learning rate lets a gate move in a stage (all of the run if it has one
lambda): peak learning rate x steps. With a decaying learning rate it is about half of that."""

# Measured on the model in assets/base (rank 8, learning rate 2e-4, one seed): with gates from
# N(0, 1), lambda 1.5 closes 46%, 32% and 39% of the components in 30, 100 and 300 steps; in 100 the
# training loss falls by 0.41 nats, and by 0.74 with lambda 0. Gates of 1 close together or not at
# all: lambda 1.4 closes 60% in 30 steps, with the others near zero, and none in 100.
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {
        "sora_lambdas": (1.5,),
        "sora_threshold": "exact",
        "sora_l1": 0.0,
    },
    "released": {
        "sora_lambdas": (3e-4,),
        "sora_threshold": "released",
        "sora_l1": 10.0,
    },
}


@dataclass(frozen=True, kw_only=True)
class SoraOptions:
    """SoRA: gates on the components go to zero"""

    sora_preset: Literal["paper", "released"] = "paper"
    """Preset for the sora options that are left unset: "paper", or "released" (the authors' code,
    in which the learning rate is 0 after the first stage)."""
    sora_lambdas: tuple[float, ...] = ()
    """Weights of the gates' L1 norm, at least 0 and rising. Each value is a stage of the run with a
    learning-rate schedule of its own. Empty: 1.5 for preset paper, 0.0003 for released."""
    sora_threshold: Literal["exact", "scaled", "released"] | None = None
    """Shrinkage of the gates at each step: exact (soft threshold of learning rate x lambda), scaled
    (soft threshold of learning rate x lambda / Adam's denominator; sora_lambdas must start with 0)
    or released (the authors' operator with threshold lambda). null: exact for preset paper,
    released for released."""
    sora_gate_lr_factor: float | None = None
    """Learning-rate multiplier for the gates, above 0. null: 1 for preset released, otherwise large
    enough for a gate of size 1 to reach 0 within a stage."""
    sora_gate_init: Literal["normal", "ones"] = "normal"
    """Initial values of the gates: normal (drawn from N(0, 1), as in the authors' code) or ones."""
    sora_l1: float | None = None
    """Weight of the mean |gate| that is added to the loss, at least 0. null: 0 for preset paper;
    for released 10, or 0.001 with several stages."""
    sora_reset_moments: bool = False
    """Reset Adam's moments at the start of each stage."""
    sora_reopen: bool = True
    """Let a gate at zero open again. If false, the next count of open gates drops its component,
    which is then no longer computed."""
    sora_every: int | None = None
    """Steps between two counts of open gates, at least 1. null: 2% of the run."""

    def __post_init__(self) -> None:
        lambdas, factor = self.sora_lambdas, self.sora_gate_lr_factor
        problems = []
        if not all(0.0 <= x < inf for x in lambdas) or list(lambdas) != sorted(set(lambdas)):
            problems.append(f"--sora_lambdas must be at least 0 and rising, got {list(lambdas)}")
        if factor is not None and factor <= 0.0:
            problems.append(f"--sora_gate_lr_factor must be above 0, got {factor}")
        if self.sora_l1 is not None and self.sora_l1 < 0.0:
            problems.append(f"--sora_l1 must be at least 0, got {self.sora_l1}")
        if self.sora_every is not None and self.sora_every < 1:
            problems.append(f"--sora_every must be at least 1, got {self.sora_every}")
        # B starts at zero, so at step 1 a gate has no gradient, Adam's denominator is its eps, and
        # every gate would close for good.
        first = as_preset(self, self.sora_preset, PRESETS).sora_lambdas[0]
        if self.sora_threshold == "scaled" and first > 0.0:
            problems.append(
                f"--sora_threshold scaled needs 0 as the first of --sora_lambdas, got {first}: "
                "otherwise every gate closes at step 1. Put 0 in front of them"
            )
        if problems:
            raise ValueError("; ".join(problems))


def sora(options: SoraOptions, context: RunContext) -> Method:
    """Return the `Method` that describes SoRA to training, planning and export.

    Args:
        options: Values of the --sora options.
        context: Length, warm-up, learning rate and adapted linears of the run.

    Raises:
        ValueError: A stage, the part of the run with one lambda, is shorter than the warm-up.
    """
    chosen = as_preset(options, options.sora_preset, PRESETS)
    lambdas: tuple[float, ...] = chosen.sora_lambdas
    stages = warmed_up_stages(
        context.total_steps,
        len(lambdas),
        warmup_steps=context.warmup_steps,
        asked=f"--sora_lambdas is {', '.join(map(str, lambdas))}",
    )
    several = len(stages) > 1
    every = options.sora_every or max(1, context.total_steps // 50)
    # The released script for stages has a smaller weight.
    in_stages = options.sora_l1 is None and several
    weight = min(chosen.sora_l1, 1e-3) if in_stages else chosen.sora_l1
    l1 = weight / sum(site.rank for site in context.sites)

    def lambda_at(step: int) -> float:
        return lambdas[stage_at(step, stages)]

    def decide(step: int, scores: Scores) -> Decision:
        return count_open(
            scores, reopen=options.sora_reopen, log_values={"lambda": lambda_at(step)}
        )

    def penalty(tensors: Tensors) -> dict[str, Tensor]:
        return {"lora_gate": l1 * tensors["lora_gate"].sign()}

    return Method(
        name="sora",
        form=gated(chosen, context, projection(chosen.sora_threshold, lambda_at)),
        penalty=penalty if l1 > 0.0 else None,
        score=magnitude,
        # Also at the first step of a stage, from which its lambda is in force.
        decides_at=lambda step: (
            step > 0 and (step % every == 0 or step in stages or step - 1 in (0, *stages))
        ),
        decide=decide,
        redraws=not several,
        stages=stages if several else (),
        stage_rate="first" if options.sora_preset == "released" else "own",
        stage_resets_moments=options.sora_reset_moments,
    )


def gated(options: SoraOptions, context: RunContext, project: Project) -> Callable[[Site], Form]:
    """Return the function for ``Method.form``: site -> form with LoRA's A and B and a gate per
    component.

    Args:
        options: Values of the --sora options, those of the preset filled in.
        context: Length and learning rate of the run.
        project: Function that shrinks the gates after each optimizer update.
    """
    init = {"ones": ones, "normal": normal}[options.sora_gate_init]
    lr_factor = gate_lr_factor(options, context)

    def form(site: Site) -> Form:
        gate = TensorSpec(
            shape=(site.rank,),
            init=init,
            component_axis=0,
            lr_factor=lr_factor,
            decays=False,
            project=project,
        )
        tensors = low_rank_pair(site) | {"lora_gate": gate}
        return Form(tensors=tensors, delta=gated_delta, to_lora=gate_in_b)

    return form


def gate_lr_factor(options: SoraOptions, context: RunContext) -> float:
    """Return the factor by which the run's learning rate is multiplied for the gates.

    At the learning rate of A and B, gates would hardly move. The default is TRAVEL / (steps of a
    stage * learning rate), with which a gate can move the same distance in a run of any length. A
    gate that starts at g then closes if about |g| < TRAVEL / 2 * (lambda - direction), where
    direction is m / sqrt(v) of Adam.

    Args:
        options: Values of the --sora options, those of the preset filled in.
        context: Length and learning rate of the run.
    """
    if options.sora_gate_lr_factor is not None:
        return options.sora_gate_lr_factor
    if options.sora_preset == "released":
        return 1.0
    steps = context.total_steps / len(options.sora_lambdas)
    return TRAVEL / (steps * context.learning_rate)


def ones(t: Tensor, generator: torch.Generator) -> None:
    """Fill ``t`` in place with 1, so that SoRA starts as LoRA.

    Gates then close all together, or not at all.

    Args:
        t: The gates of a site.
        generator: Unused; every ``TensorSpec.init`` has this argument.
    """
    t.fill_(1.0)


def normal(t: Tensor, generator: torch.Generator) -> None:
    """Fill ``t`` in place from N(0, 1), as the authors' code does.

    Small gates close first, so the rank falls gradually.

    Args:
        t: The gates of a site.
        generator: Source of the random values.
    """
    t.normal_(generator=generator)


def gated_delta(x_TI: Tensor, tensors: Tensors, scale: float) -> Tensor:
    """Return what the site adds to the linear's output: scale * x A^T diag(g) B^T.

    Args:
        x_TI: Input of the linear, [T tokens, in_features].
        tensors: ``lora_a`` (A), ``lora_b`` (B) and ``lora_gate`` (the gates g) of the site.
        scale: Scale of the delta.

    Returns:
        The delta, [T, out_features].
    """
    z_TR = x_TI @ tensors["lora_a"].t() * (tensors["lora_gate"] * scale)
    return z_TR @ tensors["lora_b"].t()


def gate_in_b(tensors: Tensors) -> tuple[Tensor, Tensor]:
    """Return (A, B diag(g)), [R, I] and [O, R], the plain LoRA pair that gives the same delta."""
    return tensors["lora_a"], tensors["lora_b"] * tensors["lora_gate"]


def magnitude(stats: Stats, w: Tensor) -> Tensor:
    """Return |w| of each entry as its score, which is 0 only for an entry that is exactly 0.

    Args:
        stats: Unused; SoRA has no statistics.
        w: Values of the entries, fp32 [N].
    """
    return w.abs()


def soft_threshold(w: Tensor, xi: float | Tensor) -> Tensor:
    """Return each entry moved towards 0 by ``xi``; entries between -xi and xi become 0.

    This is the proximal step of xi * |w|.

    Args:
        w: Values of the entries, [N].
        xi: Threshold: one number, or one for each entry.
    """
    return w - torch.clamp(w, -xi, xi)  # type: ignore[arg-type]  # both floats or both tensors


def released_threshold(w: Tensor, xi: float) -> Tensor:
    """Return ``w`` after the three operations that the authors' optimizer applies in place.

    Each operation acts on the result of the one before it. So xi < |w| < 2 xi becomes 0 too, |w| =
    2 xi becomes xi, and |w| = xi stays.

    Args:
        w: Values of the entries, [N].
        xi: Threshold.
    """
    w = torch.where(w > xi, w - xi, w)
    w = torch.where(w < -xi, w + xi, w)
    return torch.where(w.abs() < xi, 0.0, w)


def projection(threshold: str, lambda_at: Callable[[int], float]) -> Project:
    """Return the function that shrinks the gates after each optimizer update.

    Args:
        threshold: Value of --sora_threshold: "exact", "scaled" or "released".
        lambda_at: Function (step) -> weight of the gates' L1 norm at this step.
    """

    def exact(w: Tensor, update: Update) -> Tensor:
        return soft_threshold(w, update.lr * lambda_at(update.step))

    def scaled(w: Tensor, update: Update) -> Tensor:
        return soft_threshold(w, update.lr * lambda_at(update.step) / update.denominator)

    def released(w: Tensor, update: Update) -> Tensor:
        return released_threshold(w, lambda_at(update.step))

    return {"exact": exact, "scaled": scaled, "released": released}[threshold]


def count_open(scores: Scores, *, reopen: bool, log_values: dict[str, float]) -> Decision:
    """Return the decision whose open components are those with a gate that is not zero.

    All ranks must call it.

    Args:
        scores: Scores of the run; the score of a gate is its absolute value.
        reopen: True: all components stay computed, so that a gate at zero may grow again. False:
            components with a gate of zero are dropped for good.
        log_values: Numbers to log with the metrics of this step, by name.
    """
    sites = site_names(scores)
    gates = scores.sums({f"{site}.lora_gate": "row" for site in sites})
    is_open = {site: gates[f"{site}.lora_gate"] > 0.0 for site in sites}
    live, components = {}, {}
    for site, open_ones in places_of(is_open).items():
        open_R = is_open[site]
        computed = tuple(range(len(open_R))) if reopen else open_ones
        components[site] = Components(computed=computed, open=len(open_ones))
        if not reopen:
            for name, by in WITHIN.items():
                live[f"{site}.{name}"] = scores.spread(f"{site}.{name}", open_R, by)
    return Decision(live=live, components=components, log_values=log_values)


SORA = MethodFactory(
    options=SoraOptions,
    build=sora,
    summary="closes components by gates, so that ranks fall",
    example="--sora_every 2",
)
