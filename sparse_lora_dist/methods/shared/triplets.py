"""Triplets dW = B diag(lambda) A, which AdaLoRA and IncreLoRA train and rank.

Zhang et al. 2023, arXiv:2303.10512, equations 3, 4 and 8 to 12; IncreLoRA, arXiv:2308.12043, takes
them over. Component i is the triplet (column i of B, lambda_i, row i of A). A and B are held near
orthonormal by a penalty, so that lambda_i is the size of component i and comparable between sites.

IncreLoRA opens components in order, so how many are open in a site says which: ``Growth`` adds to
them.

A penalty is given by its gradient, since the loss of no rank sees a tensor whole. "squared" is
the papers', "released" the unsquared norm of both released codes.

Shapes: T tokens, I in_features, O out_features, R rank.
"""

from collections.abc import Callable
from functools import partial
from math import ceil, pow

import torch
from torch import Tensor

from sparse_lora_dist.methods.protocol.form import (
    Form,
    Site,
    Tensors,
    TensorSpec,
    alpha_over_capacity,
)
from sparse_lora_dist.methods.protocol.method import By, Scores, Stats, site_names

WITHIN: dict[str, By] = {"lora_a": "row", "lora_b": "column", "lora_lambda": "row"}
"""Segments that hold one component: row i of a_RI, column i of b_OR, entry i of lambda_R."""

CHUNK = 2**20
"""Maximum number of entries of a site's weight gradient that are held at a time."""

Init = Callable[[Tensor, torch.Generator], None]


def gaussian(std: float) -> Init:
    """Return an initialiser that fills a tensor from N(0, std^2)."""

    def init(t: Tensor, generator: torch.Generator) -> None:
        t.normal_(0.0, std, generator=generator)

    return init


RELEASED_STD = 0.02
"""Standard deviation of A and B at the start in the released codes of both methods."""


def triplet_tensors(
    site: Site, *, lambda_init: Init, lr_factor: float | None = None, released: bool = False
) -> dict[str, TensorSpec]:
    """Return the specs of A (R x I) and B (O x R), Gaussian, and lambda (R).

    Unless ``released``, rows of A and columns of B have length 1 on average, which the penalty
    holds them to. The released 0.02 has that at I = 2,500 only: in smaller linears the penalty's
    gradient drowns the loss's for hundreds of steps, in the norm that clips and in Adam's.

    The learning rate of lambda is ``lr_factor`` times that of the run, by default sqrt(O / 3): Adam
    then moves a component as far in a step as it moves LoRA's, of which O entries of B move,
    before a row of A of length 1 / sqrt(3). At a factor of 1, the papers', short runs hardly leave
    zero.
    """
    a_shape, b_shape = (site.rank, site.in_features), (site.out_features, site.rank)
    a_std, b_std = site.in_features**-0.5, site.out_features**-0.5
    if released:
        a_std = b_std = RELEASED_STD
    factor = lr_factor or (1.0 if released else (site.out_features / 3) ** 0.5)
    return {
        "lora_a": TensorSpec(shape=a_shape, init=gaussian(a_std), component_axis=0),
        "lora_b": TensorSpec(shape=b_shape, init=gaussian(b_std), component_axis=1),
        "lora_lambda": TensorSpec(
            shape=(site.rank,), init=lambda_init, component_axis=0, lr_factor=factor
        ),
    }


def triplet_delta(x_TI: Tensor, tensors: Tensors, scale: float) -> Tensor:
    """Return y_TO = scale * x A^T diag(lambda) B^T."""
    z_TR = x_TI @ tensors["lora_a"].t() * (tensors["lora_lambda"] * scale)
    return z_TR @ tensors["lora_b"].t()


def lambda_in_a(tensors: Tensors) -> tuple[Tensor, Tensor]:
    """Return (diag(lambda) A, B), the plain LoRA pair of the same delta."""
    return tensors["lora_lambda"][:, None] * tensors["lora_a"], tensors["lora_b"]


def triplet(
    site: Site,
    *,
    lambda_init: Init,
    lr_factor: float | None,
    released: bool,
    scale: Callable[[float, int, int], float] = alpha_over_capacity,
) -> Form:
    """Return the form of a site with triplets.

    Args:
        site: Linear that is adapted.
        lambda_init: Initialiser of lambda.
        lr_factor: Learning-rate multiplier for lambda. None: see ``triplet_tensors``.
        released: Start A and B as the released codes do.
        scale: (alpha, --rank, open components) -> scale.
    """
    tensors = triplet_tensors(site, lambda_init=lambda_init, lr_factor=lr_factor, released=released)
    return Form(tensors=tensors, delta=triplet_delta, to_lora=lambda_in_a, scale=scale)


def smooth_pair(stats: Stats, importance: Tensor, *, beta1: float, beta2: float) -> Stats:
    """Update the running mean of an importance and of its deviation from that mean; both start at
    0.

        mean   = beta1 * mean   + (1 - beta1) * importance
        spread = beta2 * spread + (1 - beta2) * |importance - mean|    with the mean just updated

    arXiv:2303.10512, equations 10 and 11, where an importance is an entry's |w * dL/dw|.
    """
    # Not torch.lerp: a fused kernel rounds differently at different places of a shard.
    mean = beta1 * stats[0] + (1.0 - beta1) * importance
    return mean, beta2 * stats[1] + (1.0 - beta2) * (importance - mean).abs()


def mean_times_spread(stats: Stats, w: Tensor) -> Tensor:
    """Return mean * spread, the score of an entry: arXiv:2303.10512, equation 12."""
    return stats[0] * stats[1]


def triplet_scores(scores: Scores) -> dict[str, Tensor]:
    """Return the scores of each site's components, float64 [R] by site name, equal on all ranks.
    Collective.

    s_i = s(lambda_i) + mean over j of s(b_ji) + mean over j of s(a_ij):  arXiv:2303.10512, eq. 8
    """
    sites = site_names(scores)
    sums = scores.sums({f"{site}.{name}": by for site in sites for name, by in WITHIN.items()})

    def component_scores(site: str) -> Tensor:
        a_R, b_R, lambda_R = (sums[f"{site}.{name}"] for name in WITHIN)
        num_in = scores.shapes[f"{site}.lora_a"][1]
        num_out = scores.shapes[f"{site}.lora_b"][0]
        return lambda_R + b_R / num_out + a_R / num_in

    return {site: component_scores(site) for site in sites}


def delta_sensitivity(
    x_TI: Tensor, grad_y_TO: Tensor, tensors: Tensors, scale: float, *, power: float
) -> Tensor:
    """Return sum |dW * G| / (O I)^power, float64, with G_OI = grad_y^T x the gradient by dW.

    IncreLoRA's score: a mean with power 1 (the paper), over sqrt(O I) with 0.5 (the released code).
    At most an eighth of the rows of dW and G is made at a time, so that neither is ever whole.

    G is that of one micro-batch on one rank, and the results are summed over micro-batches and
    ranks. They are absolute values, so the sum is at least that of the whole batch's gradient and
    depends on how a batch is cut; all ranks have the same sum, so they decide alike. The released
    code uses the last micro-batch of its own process only.
    """
    x_TI, grad_y_TO = x_TI.flatten(0, -2), grad_y_TO.flatten(0, -2)
    a_RI, b_OR = (t.float() for t in lambda_in_a(tensors))
    num_out, num_in = len(b_OR), a_RI.shape[1]
    total = torch.zeros((), dtype=torch.float64, device=x_TI.device)
    count = min(max(1, CHUNK // num_in), ceil(num_out / 8))
    for start in range(0, num_out, count):
        rows = slice(start, start + count)
        grad_OI = grad_y_TO[:, rows].t() @ x_TI
        total += (b_OR[rows] @ a_RI * grad_OI).abs().sum(dtype=torch.float64)
    return total * abs(scale) / pow(num_out * num_in, power)


def orthogonality(
    weight: float, num_matrices: int, *, released: bool
) -> Callable[[Tensors], dict[str, Tensor]] | None:
    """Return the penalty that keeps A and B near orthonormal, or None if ``weight`` is 0."""
    if weight == 0.0:
        return None
    if released:
        return partial(released_penalty, weight=weight, num_matrices=num_matrices)
    return partial(squared_penalty, weight=weight)


def squared_penalty(tensors: Tensors, *, weight: float) -> dict[str, Tensor]:
    """Return the gradients of weight * (|A A^T - 1|_F^2 + |B^T B - 1|_F^2), fp32: arXiv:2303.10512,
    eq. 4.

    That by A is weight * 4 (A A^T - 1) A, and that by B^T has the same form.
    """
    return {
        "lora_a": 4.0 * weight * _gram_error(tensors["lora_a"]) @ tensors["lora_a"].float(),
        "lora_b": 4.0 * weight * tensors["lora_b"].float() @ _gram_error(tensors["lora_b"].t()),
    }


def released_penalty(tensors: Tensors, *, weight: float, num_matrices: int) -> dict[str, Tensor]:
    """Return the gradients of weight / num_matrices * (|A A^T - 1|_F + |B^T B - 1|_F), fp32.

    The norms unsquared, and averaged over the matrices of the whole model, two a site: what the
    released trainers add.
    """
    squared = squared_penalty(tensors, weight=weight / num_matrices / 2.0)
    norms = {
        "lora_a": _gram_error(tensors["lora_a"]).norm(),
        "lora_b": _gram_error(tensors["lora_b"].t()).norm(),
    }
    # An orthonormal matrix has gradient 0, not 0 / 0.
    tiny = torch.finfo(torch.float32).tiny
    return {name: grad / norms[name].clamp(min=tiny) for name, grad in squared.items()}


def _gram_error(a_RI: Tensor) -> Tensor:
    """Return A A^T - 1, symmetric, fp32."""
    a_RI = a_RI.float()
    return a_RI @ a_RI.t() - torch.eye(len(a_RI), device=a_RI.device)
