"""RoseLoRA: every rank-1 piece becomes a sparse outer product, by smoothed sensitivity.

Wang et al. 2024, arXiv:2406.10777. The product B A is to touch few weights. Sparse factors alone do
not give that, so the constraint stands per row of A and per column of B:

    I_t = |w * dL/dw|            smoothed_t = beta * smoothed_{t-1} + (1 - beta) * I_t
    keep in each row of A the top  max(1, floor(tau_t * I))  entries by smoothed_t,
    in each column of B the top    max(1, floor(tau_t * O)),  and zero the rest,

with tau_t falling from 1 to tau by a cubic schedule. With all kept fractions tau, at least
1 - R tau^2 of the product's entries are zero (Proposition 1).

Where we differ from the released loop (github.com/lliutianc/roselora, 0b8f41a), on purpose: the
schedule counts optimizer steps and is a fraction of the run, not 3 to 20 passes over the data; the
average starts at zero, not at its first value; exactly k entries stay, not one more; nothing is
clamped to 3e-3; a dead entry has no moments, so it does not move for a step before it is zeroed.
As there, the gradient norm that clips counts all entries, dead ones too.

Shapes: R rank, I in_features, O out_features.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_lora_dist.methods.base import By, Method, MethodFactory, Scores, Stats
from sparse_lora_dist.schedule import cubic_keep

WITHIN: dict[str, By] = {"lora_a": "row", "lora_b": "column"}
"""Piece i of the delta is row i of a_RI times column i of b_OR."""


@dataclass(frozen=True, kw_only=True)
class RoseLoraOptions:
    """RoseLoRA: rows of A and columns of B become sparse"""

    roselora_keep: float = 0.05
    """Fraction of each row of A and column of B that is kept in the end, in (0, 1]."""
    roselora_begin: float = 0.1
    """Fraction of the run after which entries begin to go."""
    roselora_end: float = 0.8
    """Fraction of the run at which only roselora_keep is left, above roselora_begin."""
    roselora_every: int = 1
    """Steps between two decisions; in between the masks stay."""
    roselora_beta: float = 0.8
    """Weight of the past in the smoothed sensitivity, in [0, 1)."""

    def __post_init__(self) -> None:
        problems = []
        if not 0.0 < self.roselora_keep <= 1.0:
            problems.append(f"roselora_keep must be in (0, 1], got {self.roselora_keep}")
        if not 0.0 <= self.roselora_begin < self.roselora_end <= 1.0:
            problems.append(
                "roselora_begin and roselora_end must be 0 <= begin < end <= 1, "
                f"got {self.roselora_begin} and {self.roselora_end}"
            )
        if self.roselora_every < 1:
            problems.append(f"roselora_every must be at least 1, got {self.roselora_every}")
        if not 0.0 <= self.roselora_beta < 1.0:
            problems.append(f"roselora_beta must be in [0, 1), got {self.roselora_beta}")
        if problems:
            raise ValueError("; ".join(problems))


def roselora(options: RoseLoraOptions, total_steps: int) -> Method:
    """Prunes from ``begin`` to ``end`` of the run, one decision every so many steps.

    Raises:
        ValueError: the run is too short to prune in.
    """
    # Not before step 2: at step 1 B is zero, so every importance is, and ties would decide.
    begin = max(1, round(options.roselora_begin * total_steps))
    end = max(begin + 1, round(options.roselora_end * total_steps))
    if end > total_steps:
        raise ValueError(
            f"pruning would end at step {end}, but the run has {total_steps}: "
            "lower roselora_begin or raise max_steps"
        )

    def observe(stats: Stats, w: Tensor, grad: Tensor) -> Stats:
        return (smooth_sensitivity(stats[0], w, grad, beta=options.roselora_beta),)

    def decide(step: int, scores: Scores) -> dict[str, Tensor]:
        keep = cubic_keep(step, begin=begin, end=end, final=options.roselora_keep)
        return keep_within_pieces(scores, keep)

    def decides_at(step: int) -> bool:
        # The end is always decided on, and the last step too: a resume may have moved the end.
        # After the end nothing can change, since what is dead has no sensitivity.
        due = step <= end and step % options.roselora_every == 0
        return step > begin and (due or step in (end, total_steps))

    return Method(name="roselora", n_stats=1, observe=observe, decides_at=decides_at, decide=decide)


def smooth_sensitivity(smoothed: Tensor, w: Tensor, grad: Tensor, *, beta: float) -> Tensor:
    """beta * smoothed + (1 - beta) * |w * grad|"""
    return torch.lerp((w * grad).abs(), smoothed, beta)


def keep_within_pieces(scores: Scores, keep: float) -> dict[str, Tensor]:
    """The top fraction ``keep`` of every row of A and every column of B; ties: lowest index."""
    masks = {}
    for name, score in scores.items():
        by = WITHIN[name.rpartition(".")[2]]
        size = score.shape[1] if by == "row" else score.shape[0]
        # The little more: 0.29 * 100 is 28.999... in floating point.
        masks[name] = score.top_k(max(1, int(keep * size + 1e-9)), by)
    return masks


ROSELORA = MethodFactory(
    options=RoseLoraOptions,
    build=roselora,
    summary="rank-1 pieces become sparse, so that few weights are touched",
)
