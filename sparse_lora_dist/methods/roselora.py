"""RoseLoRA: prune A and B until every rank-1 component is a sparse outer product.

    y = W x + (alpha / R) B A x
    I_t = |w * dL/dw|,    smoothed_t = beta * smoothed_{t-1} + (1 - beta) * I_t
    keep in each row of A the top      max(1, floor(tau_t * I))  entries by smoothed_t,
    in each column of B the top        max(1, floor(tau_t * O)),  and zero the others

I_t is the sensitivity of an entry w of A or B at step t, and beta is `roselora_beta`. The limit
holds per row of A and per column of B because sparse factors alone do not make a sparse product.
With it, at least 1 - R tau^2 of the entries of B A are zero (Proposition 1).

The method decides every `roselora_every` steps between `roselora_begin` and `roselora_end`, from
the smoothed sensitivity. The kept fraction tau_t falls from 1 to `roselora_keep` on a cubic curve.

This implementation differs from the paper: the schedule is a fraction of the run's optimizer steps,
where the released code takes 3 to 20 passes over the data. As in that code, the gradient norm that
is clipped counts pruned entries too.

Preset `released` follows the loop for knowledge editing of github.com/lliutianc/roselora (0b8f41a):

- Of the d entries of a row or column it zeroes those below the k-th smallest, k = int(d (1 -
  tau_t)). So d - k + 1 entries stay, or more with ties.
- The smoothed sensitivity starts at its first value, not at zero.
- Pruned entries keep their Adam moments, move in each step and are zeroed again after it.
- A and B are clamped to 3e-3 once tau_t < 1.

In short:

- **Optimizer state:** 8 bytes x live entries (those that are not pruned); falls to about
  `roselora_keep` of its start (not with preset `released`, where pruned entries count as live).
- **Statistics:** 4 bytes x trained entries until pruning ends (preset `released`: to the end).
- **Exports as:** PEFT LoRA, merged model or sparse delta.
- **Choose it when:** few weights of the base may change, as in knowledge edits and small diffs; it
  is not for many edits in sequence.
- **Paper:** Wang et al. 2024, arXiv:2406.10777.

Shapes: R rank, I in_features, O out_features, d entries of a row of A or a column of B, N entries
of a slice.
"""

from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from sparse_lora_dist.methods.protocol.form import Form, Site, Update, low_rank_pair
from sparse_lora_dist.methods.protocol.method import (
    By,
    Decision,
    Method,
    MethodFactory,
    RunContext,
    Scores,
    Stats,
    as_preset,
)
from sparse_lora_dist.methods.shared.schedules import cubic_keep

WITHIN: dict[str, By] = {"lora_a": "row", "lora_b": "column"}
"""{short tensor name: which part of the tensor belongs to one component}: component i has row i of
A and column i of B."""

PRESETS: dict[str, dict[str, Any]] = {
    "paper": {
        "roselora_seed_average": False,
        "roselora_ties": "exact",
        "roselora_clamp": 0.0,
        "roselora_dense_moments": False,
    },
    "released": {
        "roselora_seed_average": True,
        "roselora_ties": "kthvalue",
        "roselora_clamp": 3e-3,
        "roselora_dense_moments": True,
    },
}


@dataclass(frozen=True, kw_only=True)
class RoseLoraOptions:
    """RoseLoRA: rows of A and columns of B become sparse"""

    roselora_preset: Literal["paper", "released"] = "paper"
    """Preset for the roselora options that are left unset: "paper", or "released" (the authors'
    code)."""
    roselora_keep: float = 0.05
    """Fraction of the entries of each row of A and column of B that is kept at the end, in (0, 1];
    1 turns pruning off."""
    roselora_begin: float = 0.1
    """Fraction of the run after which pruning begins, at least 0 and below roselora_end."""
    roselora_end: float = 0.8
    """Fraction of the run at which the kept fraction reaches roselora_keep, above roselora_begin
    and at most 1."""
    roselora_every: int | None = None
    """Steps between two pruning decisions, at least 1; masks stay unchanged in between. null: 1% of
    the run, or 1 with roselora_dense_moments."""
    roselora_beta: float = 0.8
    """Decay rate of the smoothed sensitivity |w * dL/dw| of each entry, in [0, 1)."""
    roselora_seed_average: bool | None = None
    """Start the smoothed sensitivity at its first value instead of at zero. null: false for preset
    paper, true for released."""
    roselora_ties: Literal["exact", "kthvalue"] | None = None
    """Rule for scores that tie at the threshold: exact keeps a fixed number of entries, lowest
    index first; kthvalue keeps all entries at or above the threshold. null: exact for preset paper,
    kthvalue for released."""
    roselora_clamp: float | None = None
    """Largest absolute value of an entry of A or B once pruning has begun, at least 0; 0 clamps
    nothing. null: 0 for preset paper, 0.003 for released."""
    roselora_dense_moments: bool | None = None
    """Keep the moments of pruned entries, which then move in every step and are zeroed again after
    it; requires roselora_every 1. null: false for preset paper, true for released."""

    def __post_init__(self) -> None:
        problems = []
        if not 0.0 < self.roselora_keep <= 1.0:
            problems.append(f"--roselora_keep must be in (0, 1], got {self.roselora_keep}")
        if not 0.0 <= self.roselora_begin < self.roselora_end <= 1.0:
            problems.append(
                "--roselora_begin and --roselora_end must satisfy 0 <= begin < end <= 1, "
                f"got {self.roselora_begin} and {self.roselora_end}"
            )
        if self.roselora_every is not None and self.roselora_every < 1:
            problems.append(f"--roselora_every must be at least 1, got {self.roselora_every}")
        if not 0.0 <= self.roselora_beta < 1.0:
            problems.append(f"--roselora_beta must be in [0, 1), got {self.roselora_beta}")
        if self.roselora_clamp is not None and not 0.0 <= self.roselora_clamp < float("inf"):
            problems.append(f"--roselora_clamp must be at least 0, got {self.roselora_clamp}")
        dense = as_preset(self, self.roselora_preset, PRESETS).roselora_dense_moments
        if dense and (self.roselora_every or 1) > 1:
            problems.append(
                f"--roselora_every must be 1 with dense moments, got {self.roselora_every}: AdamW "
                "keeps moments for pruned entries too, so they would become nonzero until the next "
                "decision. Set --roselora_every 1, or --roselora_dense_moments false"
            )
        if problems:
            raise ValueError("; ".join(problems))


def roselora(options: RoseLoraOptions, context: RunContext) -> Method:
    """Return the `Method` that describes RoseLoRA to training, planning and export.

    Args:
        options: Values of the --roselora options.
        context: Length of the run.

    Raises:
        ValueError: The run is too short to prune in.
    """
    options = as_preset(options, options.roselora_preset, PRESETS)
    # Not before step 2: at step 1 B is zero, so every importance is, and ties would decide.
    begin = max(1, round(options.roselora_begin * context.total_steps))
    end = max(begin + 1, round(options.roselora_end * context.total_steps))
    if end > context.total_steps:
        raise ValueError(
            f"pruning would end at step {end}, but the run has {context.total_steps} steps. Lower "
            "--roselora_begin or raise --max_steps"
        )
    prunes, dense = options.roselora_keep < 1.0, options.roselora_dense_moments
    every = options.roselora_every or (1 if dense else max(1, context.total_steps // 100))

    def observe(stats: Stats, w: Tensor, grad: Tensor, step: int) -> Stats:
        beta = 0.0 if step == 1 and options.roselora_seed_average else options.roselora_beta
        return (smooth_sensitivity(stats[0], w, grad, beta=beta),)

    def decide(step: int, scores: Scores) -> Decision:
        keep = cubic_keep(step, begin=begin, end=end, final=options.roselora_keep)
        exact = options.roselora_ties == "exact"
        masks = keep_within_components(scores, keep) if exact else kept_by_kthvalue(scores, keep)
        dead = {name: ~mask for name, mask in masks.items()}
        log_values = {"keep": keep}
        if dense:
            return Decision(zero=dead, log_values=log_values)
        return Decision(live=masks, log_values=log_values)

    def decides_at(step: int) -> bool:
        # With dense moments pruned entries move again in every step, to the last one.
        due = step == end or (step > end and dense) or (begin < step < end and step % every == 0)
        return prunes and due

    def clamp(w: Tensor, update: Update) -> Tensor:
        bound = options.roselora_clamp if update.step > begin else None
        return w.clamp(-bound, bound) if bound else w

    def form(site: Site) -> Form:
        project = clamp if options.roselora_clamp else None
        return Form(tensors=low_rank_pair(site, project=project))

    return Method(
        name="roselora",
        form=form,
        n_stats=1 if prunes else 0,
        observe=observe,
        observes_until=None if dense else end,
        redraws=not prunes,
        decides_at=decides_at,
        decide=decide,
    )


def smooth_sensitivity(smoothed: Tensor, w: Tensor, grad: Tensor, *, beta: float) -> Tensor:
    """Return the updated running mean of |w * grad|: beta * smoothed + (1 - beta) * |w * grad|.

    Args:
        smoothed: Running mean before the update, fp32 [N] for a slice of N entries.
        w: Values of the entries.
        grad: Gradient of the entries.
        beta: Decay rate of the running mean.
    """
    # Not torch.lerp: a fused kernel rounds differently at different places of a shard.
    return beta * smoothed + (1.0 - beta) * (w * grad).abs()


def keep_within_components(scores: Scores, keep: float) -> dict[str, Tensor]:
    """Select the fraction ``keep`` of highest score in every row of A and every column of B.

    Of equal scores, those of the lowest index are selected. All ranks must call it.

    Args:
        scores: Scores of the entries of all trained tensors.
        keep: Fraction to select, in (0, 1]; at least one entry of each row or column is selected.

    Returns:
        Tensor name -> this rank's slice of the mask, bool [N]; True means kept.
    """
    by = {name: WITHIN[name.rpartition(".")[2]] for name in scores.shapes}
    # 1e-9 is added because 0.29 * 100 is 28.999... in floating point.
    k = {n: max(1, int(keep * _size(shape, by[n]) + 1e-9)) for n, shape in scores.shapes.items()}
    return scores.top_k(k, by)


def kept_by_kthvalue(scores: Scores, keep: float) -> dict[str, Tensor]:
    """Select entries as the authors' code does: all that are not below the k-th smallest score.

    This is done in each row of A and each column of B. For d entries, k = int(d (1 - keep)). So d -
    k + 1 entries are selected, more if several equal the k-th, and all d if k is 0. All ranks must
    call it.

    Args:
        scores: Scores of the entries of all trained tensors.
        keep: Fraction to select, in (0, 1].

    Returns:
        Tensor name -> this rank's slice of the mask, bool [N]; True means kept.
    """
    by = {name: WITHIN[name.rpartition(".")[2]] for name in scores.shapes}
    k = {}
    for name, shape in scores.shapes.items():
        size = _size(shape, by[name])
        below = int(size * (1.0 - keep))
        k[name] = size - below + 1 if below else size
    return scores.top_k(k, by, ties="all")


def _size(shape: tuple[int, ...], by: By) -> int:
    return shape[1] if by == "row" else shape[0]


ROSELORA = MethodFactory(
    options=RoseLoraOptions,
    build=roselora,
    summary="prunes A and B, so that few weights change",
    example="--roselora_keep 0.1",
)
