"""Chain of LoRA: cut the run into links; each trains a new pair and freezes the pairs before it.

    y = W x + (alpha / R) (B A + sum over earlier links j of B_j A_j) x

A *link* is one of `cola_links` equal parts of the run. At its start A is drawn anew as LoRA's is,
and B is zero. Each link has its own learning-rate schedule and Adam moments. The update has rank up
to `cola_links` x R, while only R components train at a time.

The method decides at the end of each link but the last: the trained pair (A, B) is moved into a
frozen pair beside the base, the stack, of C (Q x I) and D (O x Q) in fp32, where D C is the sum of
the products of all earlier pairs. If `cola_stack_rank` limits Q, the sum is replaced by the nearest
product of rank Q; the relative error is logged as `fold_error`.

This implementation differs from the paper:

- The paper merges each pair into the weight. A 4-bit base would mostly round it away, so the stack
  holds it here.
- The paper's merged pairs see the whole input; the stack sees it after dropout.
- The variant whose rank falls from link to link is not implemented.

In short:

- **Optimizer state:** 8 bytes x trained entries, as many as LoRA of the same `--rank`.
- **Statistics:** none; 4 bytes x entries of the frozen stack, Q (I + O) a linear.
- **Exports as:** PEFT LoRA of rank R + Q, merged model or sparse delta.
- **Choose it when:** you want an update of higher rank than can train at a time; forward costs as
  much as that of LoRA of rank R + Q.
- **Paper:** Xia et al. 2024, arXiv:2401.04151.

Shapes: T tokens, I in_features, O out_features, R rank, Q rank of the stack, L components of a sum.
"""

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_lora_dist.methods.protocol.form import (
    Form,
    KeptSpec,
    Site,
    Tensors,
    TensorSpec,
    kaiming_uniform,
    low_rank_delta,
    zeros,
)
from sparse_lora_dist.methods.protocol.method import Method, MethodFactory, RunContext
from sparse_lora_dist.methods.protocol.rewriting import Rewriting, Rewritten, Whole
from sparse_lora_dist.methods.shared.schedules import warmed_up_stages

ROOM = 8
"""The default --cola_stack_rank is at most this many times --rank."""


@dataclass(frozen=True, kw_only=True)
class ColaOptions:
    """Chain of LoRA: pairs train in turn, and each is then frozen"""

    cola_links: int = 3
    """Number of equal parts of the run that each train a new pair, at least 1; 1 is plain LoRA."""
    cola_stack_rank: int | None = None
    """Rank of the frozen stack (the sum of all pairs that were trained before), at least 1 and at
    most the smallest side of a linear. null: the sum of the ranks of these pairs, but at most 8 x
    --rank."""

    def __post_init__(self) -> None:
        problems = []
        if self.cola_links < 1:
            problems.append(f"--cola_links must be at least 1, got {self.cola_links}")
        if self.cola_stack_rank is not None and self.cola_stack_rank < 1:
            problems.append(f"--cola_stack_rank must be at least 1, got {self.cola_stack_rank}")
        if problems:
            raise ValueError("; ".join(problems))


def cola(options: ColaOptions, context: RunContext) -> Method:
    """Return the `Method` that describes Chain of LoRA to training, planning and export.

    Args:
        options: Values of the --cola options.
        context: Length, warm-up and adapted linears of the run.

    Raises:
        ValueError: A link (one of the equal parts of the run) is shorter than the warm-up, or
            --cola_stack_rank is above the smallest side of a linear.
    """
    if options.cola_links == 1:
        return Method(name="cola")
    check(options, context)
    stages = warmed_up_stages(
        context.total_steps,
        options.cola_links,
        warmup_steps=context.warmup_steps,
        asked=f"--cola_links is {options.cola_links}",
    )
    return Method(
        name="cola",
        form=partial(stacked, options=options),
        rewriting=Rewriting(
            at=lambda step: step in stages[:-1],
            write=fold,
            says=True,
            reads_weight=False,
        ),
        redraws=False,
        stages=stages,
        stage_resets_moments=True,
    )


def check(options: ColaOptions, context: RunContext) -> None:
    """Raise ValueError if --cola_stack_rank is above the smallest side of a linear.

    Args:
        options: Values of the --cola options.
        context: Adapted linears of the run.
    """
    least = min(context.sites, key=lambda site: min(site.out_features, site.in_features))
    side = min(least.out_features, least.in_features)
    if options.cola_stack_rank is not None and options.cola_stack_rank > side:
        raise ValueError(
            f"--cola_stack_rank is {options.cola_stack_rank}, but {least.name} is only "
            f"{least.out_features} x {least.in_features}. Take {side} or less"
        )


def stack_rank(site: Site, options: ColaOptions) -> int:
    """Return the rank of the frozen stack of ``site``, the pair that holds all earlier trained
    pairs.

    It is the sum of the ranks of all folded pairs, but at most --cola_stack_rank (8 x --rank if
    that is not given) and at most the smallest side of the linear.

    Args:
        site: The linear that is adapted.
        options: Values of the --cola options.
    """
    pairs = (options.cola_links - 1) * site.rank
    asked = options.cola_stack_rank or ROOM * site.rank
    return min(pairs, asked, site.out_features, site.in_features)


def stacked(site: Site, options: ColaOptions) -> Form:
    """Return the form of a site with a trained pair (A, B) and a frozen stack (C, D).

    The product D C of the stack is the sum of all earlier pairs. C and D are kept tensors, named
    ``cola_a`` and ``cola_b``.

    Args:
        site: The linear that is adapted.
        options: Values of the --cola options.
    """
    rank = stack_rank(site, options)
    a_shape, b_shape = (site.rank, site.in_features), (site.out_features, site.rank)
    return Form(
        tensors={
            "lora_a": TensorSpec(shape=a_shape, init=kaiming_uniform),
            "lora_b": TensorSpec(shape=b_shape, init=zeros),
        },
        kept={
            "cola_a": KeptSpec(shape=(rank, site.in_features)),
            "cola_b": KeptSpec(shape=(site.out_features, rank)),
        },
        delta=stacked_delta,
        to_lora=side_by_side,
    )


def stacked_delta(x_TI: Tensor, tensors: Tensors, scale: float) -> Tensor:
    """Return what the site adds to the linear's output: scale * x (B A + D C)^T.

    Args:
        x_TI: Input of the linear, [T tokens, in_features].
        tensors: The trained pair ``lora_a`` (A) and ``lora_b`` (B), and the frozen stack of earlier
            pairs, ``cola_a`` (C) and ``cola_b`` (D).
        scale: Scale of the delta.

    Returns:
        The delta, [T, out_features].
    """
    # Not one pair of rank R + Q: autograd would make gradients of the stack too.
    stack = {"lora_a": tensors["cola_a"], "lora_b": tensors["cola_b"]}
    return low_rank_delta(x_TI, tensors, scale) + low_rank_delta(x_TI, stack, scale)


def side_by_side(tensors: Tensors) -> tuple[Tensor, Tensor]:
    """Return the plain LoRA pair that gives the same delta as the trained pair (A, B) and the stack
    (C, D).

    Returns:
        (A above C, B beside D). Its rank is the sum of the ranks of the trained pair and of the
            stack.
    """
    a_LI = torch.cat([tensors["lora_a"], tensors["cola_a"]])
    return a_LI, torch.cat([tensors["lora_b"], tensors["cola_b"]], dim=1)


def fold(whole: Whole) -> Rewritten:
    """Append the trained pair (A, B) of a site to its frozen stack, and return all new tensors.

    The stack (C, D) holds the pairs of all earlier links, joined along the rank. Called at the end
    of each link but the last. The new A is random and the new B zero. If the stack would exceed its
    rank, its product D C is replaced by the nearest matrix of that rank; the relative error is
    logged as ``fold_error``.

    Args:
        whole: The site's tensors, unsharded.
    """
    a_RI, b_OR = whole.tensors["lora_a"], whole.tensors["lora_b"]
    c_QI, d_OQ = whole.tensors["cola_a"], whole.tensors["cola_b"]
    # Not from the number of links: after --reset schedule the stack is not empty.
    rank, used, error = len(c_QI), int((c_QI != 0).any(1).sum()), 0.0
    c_LI = torch.cat([c_QI[:used], a_RI])
    d_OL = torch.cat([d_OQ[:, :used], b_OR], dim=1)
    if len(c_LI) > rank:
        c_LI, d_OL, error = nearest(c_LI, d_OL, rank)
    fresh_RI = torch.empty(a_RI.shape)
    kaiming_uniform(fresh_RI, whole.generator)
    free = rank - len(c_LI)
    tensors = {
        "lora_a": fresh_RI.to(a_RI.device),
        "lora_b": torch.zeros_like(b_OR),
        "cola_a": F.pad(c_LI, (0, 0, 0, free)),
        "cola_b": F.pad(d_OL, (0, free)),
    }
    return Rewritten(tensors=tensors, log_values={"fold_error": error})


def nearest(c_LI: Tensor, d_OL: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """Return the product of rank ``rank`` that is nearest to D C in the Frobenius norm.

    The singular values of D C come from QR decompositions of both factors, so that the [O, I]
    product is never computed.

    Args:
        c_LI: C, right factor of the product of rank L.
        d_OL: D, left factor of the product.
        rank: Rank of the result, at most L.

    Returns:
        The new C [rank, I], the new D [O, rank], and the norm of the difference divided by that of
            D C.
    """
    # On the CPU, so that the result does not depend on the device.
    q_OL, r_LL = torch.linalg.qr(d_OL.double().cpu())
    p_IL, s_LL = torch.linalg.qr(c_LI.double().cpu().t())
    u_LL, sigma_L, v_LL = torch.linalg.svd(r_LL @ s_LL.t(), full_matrices=False)
    root_Q = sigma_L[:rank].sqrt()
    near_OQ = q_OL @ u_LL[:, :rank] * root_Q
    near_QI = root_Q[:, None] * (v_LL[:rank] @ p_IL.t())
    norm = float(sigma_L.norm())
    error = float(sigma_L[rank:].norm()) / norm if norm else 0.0
    return near_QI.to(c_LI), near_OQ.to(d_OL), error


COLA = MethodFactory(
    options=ColaOptions,
    build=cola,
    summary="trains low-rank pairs in turn, each folded into a frozen stack",
    example="--cola_links 3",
)
