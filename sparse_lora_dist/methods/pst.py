"""PST: prune the weights while they are tuned, by a mask whose score is learned.

    y = (M . W') x,  W' = W + beta U V
    S = |W'| + alpha1 A B + alpha2 (R 1^T + 1 C^T)          M keeps the entries of largest S

W is the base weight, M the mask of 0 and 1, and "." the product of entries. U, V, A, B, R (a
column) and C (a row) are trained. beta, alpha1 and alpha2 are `pst_beta`, `pst_alpha1` and
`pst_alpha2`.

U and A start at N(0, 1); V, B, R and C at zero. The gradient of M is passed to the score S
unchanged, and so through |W'| to U and V. There is no scale but beta: `--alpha` has no meaning
here. The entries of U have size 1, so a step changes W' by about sqrt(rank) learning rates: take
about a tenth of LoRA's learning rate. In 60 steps of the model in `assets/base` (rank 16, half
of the weights pruned, one seed) PST reaches a loss of 2.60 nats with learning rate 1e-3, as LoRA
does with 1e-2; with 1e-2 PST reaches 4.11.

The method decides every `pst_every` steps, from before the first step to the last step but one. The
mask of each weight is computed from its S in fp32, with int(sparsity O I) zeros; of equal scores,
the lowest index is kept. Rank 0 computes it and all ranks take it, so all prune alike. The sparsity
rises on a cubic curve between `pst_warmup` and `pst_cooldown`; if the run is resumed with more
steps, the sparsity falls back to the curve of the longer run. The W' of pruned weights goes on
changing, so they may return.

This implementation differs from the released code (github.com/alibaba/AliceMind, S4/PST, 41153b1):

- The released code computes the mask in every forward, by sorting all weights in bf16, and exports
  another mask. Here the last mask is computed before the last step, so the exported mask was
  trained with.
- In the released code the score has rank 8; here it has `--rank`.
- In the released code the initial sparsity begins after the first step; here it begins before it.
- Only `--target_modules` are pruned, not the output head.
- The adapter adds -W where an entry is pruned and beta U V elsewhere, so that no W' in bf16 rounds
  off a small change. On random weights (2048 x 2048) the rounding error is 0.25% of the norm of y
  with half of the weights pruned, and 0.35% with nine tenths; a product with M . W' has 0.24%.
- `--dropout` is refused, because it would bring pruned weights back at random.

In short:

- **Optimizer state:** 8 bytes x trained entries, about twice as many as LoRA of the same `--rank`
  unless `pst_score_rank` is set.
- **Statistics:** none; one bit x base weights for the mask.
- **Exports as:** merged model, its zeros exact in any `--dtype`; `--onto original` is refused,
  since the mask subtracts the 4-bit weights, which differ from the original ones.
- **Choose it when:** the model itself is to become sparse; every forward computes the changed
  weight of each adapted linear.
- **Paper:** Li et al. 2022, arXiv:2205.11005.

Shapes: T tokens, I in_features, O out_features, R rank of U and V, K rank of A and B.
"""

from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from torch import Tensor

from sparse_lora_dist.methods.protocol.form import WEIGHT, Form, Site, Tensors, TensorSpec, zeros
from sparse_lora_dist.methods.protocol.method import Method, MethodFactory, RunContext
from sparse_lora_dist.methods.protocol.rewriting import Rewriting, Rewritten, Share, Whole
from sparse_lora_dist.methods.shared.bit_masks import mask_spec, pack, unpack
from sparse_lora_dist.methods.shared.schedules import cubic_keep
from sparse_lora_dist.methods.shared.top_k import k_largest


@dataclass(frozen=True, kw_only=True)
class PstOptions:
    """PST: weights are pruned by a learned score while they are tuned"""

    pst_sparsity: float = 0.5
    """Fraction of each weight's entries that are zero at the end, in [0, 1)."""
    pst_initial_sparsity: float = 0.0
    """Fraction of each weight's entries that are zero at the start, from 0 to pst_sparsity."""
    pst_warmup: float = 0.1
    """Fraction of the run after which the sparsity begins to rise, at least 0; pst_warmup +
    pst_cooldown must be below 1."""
    pst_cooldown: float = 0.3
    """Fraction of the run that is left when pst_sparsity is reached, at least 0; pst_warmup +
    pst_cooldown must be below 1."""
    pst_every: int | None = None
    """Interval in steps between mask updates, at least 1; updates continue after pst_sparsity is
    reached. null: 2% of the run."""
    pst_score_rank: int | None = None
    """Rank of the low-rank part A B of the score, at least 1. null: --rank."""
    pst_beta: float = 1.0
    """Scale of the low-rank change U V of the weights, above 0."""
    pst_alpha1: float = 1.0
    """Weight of the low-rank part A B of the score, at least 0; 0 turns it off."""
    pst_alpha2: float = 1.0
    """Weight of the row and column terms of the score, at least 0; 0 turns them off."""

    def __post_init__(self) -> None:
        problems = []
        if not 0.0 <= self.pst_initial_sparsity <= self.pst_sparsity < 1.0:
            problems.append(
                "--pst_initial_sparsity and --pst_sparsity must satisfy 0 <= initial <= final < 1, "
                f"got {self.pst_initial_sparsity} and {self.pst_sparsity}"
            )
        if not (min(self.pst_warmup, self.pst_cooldown) >= 0.0) or not (
            self.pst_warmup + self.pst_cooldown < 1.0
        ):
            problems.append(
                "--pst_warmup and --pst_cooldown must be at least 0 and their sum below 1, "
                f"got {self.pst_warmup} and {self.pst_cooldown}"
            )
        for name in ("pst_every", "pst_score_rank"):
            number = getattr(self, name)
            if number is not None and number < 1:
                problems.append(f"--{name} must be at least 1, got {number}")
        if not 0.0 < self.pst_beta < float("inf"):
            problems.append(f"--pst_beta must be above 0, got {self.pst_beta}")
        for name in ("pst_alpha1", "pst_alpha2"):
            if not 0.0 <= getattr(self, name) < float("inf"):
                problems.append(f"--{name} must be at least 0, got {getattr(self, name)}")
        if problems:
            raise ValueError("; ".join(problems))


def pst(options: PstOptions, context: RunContext) -> Method:
    """Return the `Method` that describes PST to training, planning and export.

    Args:
        options: Values of the --pst options.
        context: Length of the run.

    Raises:
        ValueError: The run has no step left after --pst_sparsity is reached.
    """
    total, final = context.total_steps, options.pst_sparsity
    begin = round(options.pst_warmup * total)
    end = max(begin + 1, min(round((1.0 - options.pst_cooldown) * total), total - 1))
    if final > 0.0 and end >= total:
        least = next(n for n in count(total + 1) if round(options.pst_warmup * n) + 1 < n)
        raise ValueError(
            f"--pst_sparsity would be reached at step {end}, but the run has {total} steps, and at "
            f"least one must follow. Take --max_steps {least} or more, or a smaller --pst_warmup"
        )
    every = options.pst_every or max(1, total // 50)

    def sparsity(step: int) -> float:
        left = cubic_keep(step, begin=begin, end=end, final=0.0)
        return final + (options.pst_initial_sparsity - final) * left

    def at(step: int) -> bool:
        due = step == end or step % every == 0
        return due and step < total and sparsity(step) > 0.0

    def write(whole: Whole) -> Rewritten:
        weights = whole.site.out_features * whole.site.in_features
        pruned = int(sparsity(whole.step) * weights)
        score_OI = score(whole.weight_OI(), whole.tensors, options)
        bits_B = pack(~k_largest(score_OI, weights - pruned))
        return Rewritten(
            tensors={"pst_pruned": bits_B}, log_values={"sparsity": Share(pruned, weights)}
        )

    return Method(
        name="pst",
        form=lambda site: masked(site, options),
        rewriting=Rewriting(at=at, write=write),
    )


def score(w_OI: Tensor, tensors: Tensors, options: PstOptions) -> Tensor:
    """Return the score S = |W'| + alpha1 A B + alpha2 (R 1^T + 1 C^T) of each weight entry.

    W' = W + beta U V is the changed weight.

    Args:
        w_OI: Base weight W, fp32.
        tensors: ``pst_u`` (U), ``pst_v`` (V), ``pst_a`` (A), ``pst_b`` (B), ``pst_r`` (R) and
            ``pst_c`` (C) of the site.
        options: Values of the --pst options, with beta, alpha1 and alpha2.

    Returns:
        Scores, fp32 [O, I].
    """
    u_OR, v_RI, a_OK, b_KI, r_O, c_I = (tensors[f"pst_{key}"] for key in "uvabrc")
    changed_OI = torch.addmm(w_OI, u_OR, v_RI, alpha=options.pst_beta)
    lines_OI = options.pst_alpha2 * (r_O[:, None] + c_I)
    return torch.addmm(changed_OI.abs() + lines_OI, a_OK, b_KI, alpha=options.pst_alpha1)


def masked(site: Site, options: PstOptions) -> Form:
    """Return the form of a site with the delta y_TO = x_TI (M * W' - W)^T, * elementwise.

    M is 1 where an entry is not pruned; the kept tensor ``pst_pruned`` holds 1 - M. W' is the
    changed weight W + beta U V, with the trained factors U and V and the option beta.

    Args:
        site: The linear that is adapted.
        options: Values of the --pst options.
    """
    height, width, rank = site.out_features, site.in_features, site.rank
    score_rank = options.pst_score_rank or rank

    def delta(x_TI: Tensor, tensors: Tensors, scale: float) -> Tensor:
        change_OI: Tensor = _Masked.apply(  # type: ignore[no-untyped-call]
            options.pst_beta * tensors["pst_u"] @ tensors["pst_v"],
            tensors[WEIGHT],
            unpack(tensors["pst_pruned"], (height, width)),
            *(tensors[f"pst_{key}"] for key in "abrc"),
            options,
        )
        return x_TI @ change_OI.t()

    return Form(
        tensors={
            "pst_u": TensorSpec(shape=(height, rank), init=normal),
            "pst_v": TensorSpec(shape=(rank, width), init=zeros),
            "pst_a": TensorSpec(shape=(height, score_rank), init=normal),
            "pst_b": TensorSpec(shape=(score_rank, width), init=zeros),
            "pst_r": TensorSpec(shape=(height,), init=zeros),
            "pst_c": TensorSpec(shape=(width,), init=zeros),
        },
        # A bit is set for a pruned entry: the mask is zero until written, and then prunes nothing.
        kept={"pst_pruned": mask_spec(site)},
        reads_base=True,
        delta=delta,
        to_lora=None,
        scale=lambda *_: 1.0,
    )


def normal(t: Tensor, generator: torch.Generator) -> None:
    t.normal_(generator=generator)


class _Masked(torch.autograd.Function):
    """Compute M . W' - W, with the gradient of the mask M passed to the score S unchanged.

    The gradients of the score's factors follow from it, so backward does not compute S.
    """

    @staticmethod
    def forward(ctx: Any, change_OI: Tensor, w_OI: Tensor, pruned_OI: Tensor, *rest: Any) -> Tensor:
        *parts, ctx.options = rest
        ctx.save_for_backward(change_OI, w_OI, pruned_OI, *parts[:2])
        return torch.where(pruned_OI, -w_OI, change_OI)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_OI,), (change_OI, w_OI, pruned_OI, a_OK, b_KI) = grads, ctx.saved_tensors
        changed_OI = w_OI + change_OI
        score_OI = grad_OI * changed_OI
        through_abs = score_OI * changed_OI.sign()
        alpha1, alpha2 = ctx.options.pst_alpha1, ctx.options.pst_alpha2
        return (
            grad_OI.masked_fill(pruned_OI, 0.0) + through_abs,
            None,
            None,
            score_OI @ b_KI.t() * alpha1,
            a_OK.t() @ score_OI * alpha1,
            score_OI.sum(1) * alpha2,
            score_OI.sum(0) * alpha2,
            None,
        )


PST = MethodFactory(
    options=PstOptions,
    build=pst,
    summary="prunes the base by a learned score while tuning it",
    example="--pst_every 2",
)
