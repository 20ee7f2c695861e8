"""Triplets dW = B diag(lambda) A, the form that AdaLoRA and IncreLoRA train.

Source: Zhang et al. 2023, arXiv:2303.10512, equations 3, 4 and 8 to 12; IncreLoRA,
arXiv:2308.12043, uses the same equations. Component i is the triplet of column i of B, lambda_i and
row i of A. A penalty holds A and B near orthonormal, so that lambda_i is the size of component i
and comparable between sites (the linears that carry an adapter).

IncreLoRA opens components in ascending order, so the number of open components of a site tells
which ones they are (`shared/growth.py`).

The penalty is computed as a gradient that backward adds, not as a term of the loss, because no rank
has the whole tensors when it computes the loss. ``squared_penalty`` is that of the papers;
``released_penalty`` is the unsquared norm that the authors' code of both methods uses.

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
"""{short tensor name: which part of the tensor belongs to one component}: component i has row i of
A, column i of B and entry i of lambda."""

CHUNK = 2**20
"""Maximum number of entries of a site's weight gradient that ``delta_sensitivity`` computes at a
time."""

Init = Callable[[Tensor, torch.Generator], None]


def gaussian(std: float) -> Init:
    """Return an initialiser: a function (t, generator) that fills ``t`` in place from N(0,
    std^2)."""

    def init(t: Tensor, generator: torch.Generator) -> None:
        t.normal_(0.0, std, generator=generator)

    return init


RELEASED_STD = 0.02
"""Standard deviation of A and B at the start, in the authors' code of AdaLoRA and IncreLoRA."""


def triplet_tensors(
    site: Site, *, lambda_init: Init, lr_factor: float | None = None, released: bool = False
) -> dict[str, TensorSpec]:
    """Return the specs of the three trained tensors of dW = B diag(lambda) A.

    Initial values: by default rows of A and columns of B have length 1 on average, the length that
    the orthogonality penalty pulls them to. With the authors' standard deviation of 0.02 a row of A
    has length 1 only if in_features is 2,500, since 0.02 sqrt(2500) = 1, and a column of B only if
    out_features is. In smaller linears the gradient of the penalty is then far larger than that of
    the loss for hundreds of steps, both in the norm that is clipped and in Adam's moments.

    Learning rate of lambda: by default sqrt(out_features / 3) times that of the run. Adam moves
    each trained entry by about the learning rate per step. In plain LoRA a component moves by
    sqrt(out_features / 3) learning rates: out_features entries of its column of B move, and its row
    of A has length 1 / sqrt(3) at the start. Here both have length 1, so lambda itself must move
    that far. With the papers' factor of 1, lambda hardly leaves zero in short runs.

    Args:
        site: The linear that is adapted.
        lambda_init: Function (t, generator) that fills lambda in place.
        lr_factor: Learning-rate multiplier for lambda. None: 1 if ``released``, otherwise
            sqrt(out_features / 3).
        released: True: A and B start with the authors' standard deviation, 0.02.

    Returns:
        {short name: spec}: ``lora_a`` [R, in_features] and ``lora_b`` [out_features, R], both
            Gaussian at the start, and ``lora_lambda`` [R], where R is the site's rank.
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
    """Return what the site adds to the linear's output: scale * x A^T diag(lambda) B^T.

    Args:
        x_TI: Input of the linear, [T tokens, in_features].
        tensors: ``lora_a`` (A), ``lora_lambda`` and ``lora_b`` (B) of the site.
        scale: Scale of the delta.

    Returns:
        The delta, [T, out_features].
    """
    z_TR = x_TI @ tensors["lora_a"].t() * (tensors["lora_lambda"] * scale)
    return z_TR @ tensors["lora_b"].t()


def lambda_in_a(tensors: Tensors) -> tuple[Tensor, Tensor]:
    """Return (diag(lambda) A, B), [R, I] and [O, R], the plain LoRA pair that gives the same
    delta."""
    return tensors["lora_lambda"][:, None] * tensors["lora_a"], tensors["lora_b"]


def triplet(
    site: Site,
    *,
    lambda_init: Init,
    lr_factor: float | None,
    released: bool,
    scale: Callable[[float, int, int], float] = alpha_over_capacity,
) -> Form:
    """Return the form of a site whose delta is scale * x (B diag(lambda) A)^T.

    Args:
        site: The linear that is adapted.
        lambda_init: Function (t, generator) that fills lambda in place.
        lr_factor: Learning-rate multiplier for lambda. None: the default of ``triplet_tensors``.
        released: True: A and B start with the authors' standard deviation, 0.02.
        scale: Function (alpha, --rank, open components) -> scale of the delta.
    """
    tensors = triplet_tensors(site, lambda_init=lambda_init, lr_factor=lr_factor, released=released)
    return Form(tensors=tensors, delta=triplet_delta, to_lora=lambda_in_a, scale=scale)


def smooth_pair(stats: Stats, importance: Tensor, *, beta1: float, beta2: float) -> Stats:
    """Update the running mean of an importance and of its deviation from that mean.

        mean   = beta1 * mean   + (1 - beta1) * importance
        spread = beta2 * spread + (1 - beta2) * |importance - mean|     (with the updated mean)

    Source: arXiv:2303.10512, equations 10 and 11. There the importance is |w * dL/dw| of an entry.

    Args:
        stats: (mean, spread) before the update; both start at 0.
        importance: New importance of each entry, shaped like ``mean``.
        beta1: Decay rate of the mean.
        beta2: Decay rate of the deviation.

    Returns:
        (mean, spread) after the update.
    """
    # Not torch.lerp: a fused kernel rounds differently at different places of a shard.
    mean = beta1 * stats[0] + (1.0 - beta1) * importance
    return mean, beta2 * stats[1] + (1.0 - beta2) * (importance - mean).abs()


def mean_times_spread(stats: Stats, w: Tensor) -> Tensor:
    """Return mean * spread of each entry as its importance: arXiv:2303.10512, equation 12.

    Args:
        stats: (mean, spread), fp32 [N] each, as ``smooth_pair`` returns them.
        w: Unused; every ``Method.score`` has this argument.

    Returns:
        Importance of each entry, fp32 [N].
    """
    return stats[0] * stats[1]


def triplet_scores(scores: Scores) -> dict[str, Tensor]:
    """Compute the score of every component of every site. All ranks must call it.

        s_i = s(lambda_i) + mean over j of s(b_ji) + mean over j of s(a_ij)

    Here s is the score of an entry and i the component. Source: arXiv:2303.10512, equation 8.

    Args:
        scores: Scores of the entries of all trained tensors.

    Returns:
        Site name -> scores of its components, float64 [R], equal on all ranks.
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
    """Return sum |dW * G| / (O I)^power, IncreLoRA's importance of a site, from one backward.

    dW is the delta as a matrix and G = grad_y^T x its gradient, both [O, I], for O out_features and
    I in_features. They are computed in parts of at most an eighth of their rows, so that neither is
    ever in memory as a whole.

    G is the gradient of one micro-batch on one rank; the adapter sums the importances over
    micro-batches and averages them over ranks. An importance is a sum of absolute values, so this
    total is at least the importance from the gradient of the whole batch, and it depends on how the
    batch is split. All ranks get the same total, so they decide alike. In the authors' code each
    process uses only its own last micro-batch.

    Args:
        x_TI: Input of the linear.
        grad_y_TO: Gradient of the loss with respect to the linear's output.
        tensors: ``lora_a``, ``lora_b`` and ``lora_lambda`` of the site.
        scale: Scale of the delta.
        power: 1 for a mean over all entries (the paper), 0.5 for a sum over sqrt(O I) (the authors'
            code).

    Returns:
        The importance, a float64 scalar tensor.
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
    """Return the function for ``Method.penalty`` that keeps A and B near orthonormal.

    Args:
        weight: Weight of the penalty in the loss.
        num_matrices: Number of matrices A and B in the model, two per site. Used only if
            ``released``.
        released: True: the mean of unsquared norms, as in the authors' code. False: the squared
            norms of the papers.

    Returns:
        Function (tensors) -> gradients by short tensor name; None if ``weight`` is 0.
    """
    if weight == 0.0:
        return None
    if released:
        return partial(released_penalty, weight=weight, num_matrices=num_matrices)
    return partial(squared_penalty, weight=weight)


def squared_penalty(tensors: Tensors, *, weight: float) -> dict[str, Tensor]:
    """Return the gradients of weight * (|A A^T - 1|_F^2 + |B^T B - 1|_F^2) with respect to A and B.

    The gradient for A is weight * 4 (A A^T - 1) A; that for B^T has the same form. Source:
    arXiv:2303.10512, equation 4.

    Args:
        tensors: Tensors of a site, of which ``lora_a`` (A) and ``lora_b`` (B) are read.
        weight: Weight of the penalty in the loss.

    Returns:
        Gradients for ``lora_a`` and ``lora_b``, in their shapes, fp32.
    """
    return {
        "lora_a": 4.0 * weight * _gram_error(tensors["lora_a"]) @ tensors["lora_a"].float(),
        "lora_b": 4.0 * weight * tensors["lora_b"].float() @ _gram_error(tensors["lora_b"].t()),
    }


def released_penalty(tensors: Tensors, *, weight: float, num_matrices: int) -> dict[str, Tensor]:
    """Return the gradients of weight / num_matrices * (|A A^T - 1|_F + |B^T B - 1|_F) with respect
    to A and B.

    This is what the authors' trainers add to the loss: norms that are not squared, averaged over
    all matrices of the model.

    Args:
        tensors: Tensors of a site, of which ``lora_a`` (A) and ``lora_b`` (B) are read.
        weight: Weight of the penalty in the loss.
        num_matrices: Number of matrices A and B in the model, two per site.

    Returns:
        Gradients for ``lora_a`` and ``lora_b``, in their shapes, fp32.
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
    """Return A A^T minus the identity, symmetric, fp32 [R, R]."""
    a_RI = a_RI.float()
    return a_RI @ a_RI.t() - torch.eye(len(a_RI), device=a_RI.device)
