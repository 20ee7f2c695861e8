"""SHiRA and random masking: values on a fixed support of the weight train, and nothing else.

Bhardwaj et al. 2024, arXiv:2406.13175 (SHiRA-Rand); Xu and Zhang 2024, arXiv:2405.02596. W + S, S
zero but for N entries whose places do not change and whose values train from zero. N is R (I + O),
what a LoRA of rank R has, or a share of the weight. Without a scale: --alpha has no meaning here.

Places are drawn from the seed and the linear's name at every use, one in each of N equal parts of
the flattened weight, where the papers draw all from one urn, and are never kept. The gradient of
the values is taken at their places only: no gradient of the whole weight is made, as automatic
differentiation would.

Shapes: T tokens, I in_features, O out_features, N entries that train.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparse_lora_dist.methods.base import Method, MethodFactory, Plan
from sparse_lora_dist.methods.form import Form, Site, Tensors, TensorSpec, zeros
from sparse_lora_dist.methods.hashed import stratified

CHUNK = 2**24
"""Products of gradient and input that are held at a time, at most."""


@dataclass(frozen=True, kw_only=True)
class ShiraOptions:
    """SHiRA: chosen entries of the weights train"""

    shira_density: float | None = None
    """Share of each weight's entries that train, in (0, 1]; null: as many as LoRA of --rank has."""

    def __post_init__(self) -> None:
        if self.shira_density is not None and not 0.0 < self.shira_density <= 1.0:
            raise ValueError(f"shira_density must be in (0, 1], got {self.shira_density}")


def shira(options: ShiraOptions, plan: Plan) -> Method:
    """Nothing is decided.

    Raises:
        ValueError: more entries are to train than a weight has.
    """
    for site in plan.sites:
        weight = site.out_features * site.in_features
        if count_of(site, options.shira_density) > weight:
            most = weight // (site.out_features + site.in_features)
            raise ValueError(
                f"{site.name} is {site.out_features} x {site.in_features}: --rank {site.rank} "
                f"makes {count_of(site, None):,} entries of its {weight:,}; take {most} or less"
            )
    return Method(name="shira", form=lambda site: chosen_entries(site, options.shira_density))


def count_of(site: Site, density: float | None) -> int:
    """N, at least 1."""
    if density is None:
        return site.rank * (site.in_features + site.out_features)
    return max(1, int(density * site.in_features * site.out_features))


def chosen_entries(site: Site, density: float | None) -> Form:
    """y_TO = x S^T"""
    count, weight = count_of(site, density), site.out_features * site.in_features

    def drawn(seed: int, device: torch.device) -> dict[str, Tensor]:
        return {"places": stratified(count, weight, seed, device)}

    def delta(x_TI: Tensor, tensors: Tensors, scale: float) -> Tensor:
        y_TO: Tensor = _SparseProduct.apply(  # type: ignore[no-untyped-call]
            x_TI, tensors["shira_values"], tensors["places"], site.out_features
        )
        return y_TO

    tensors = {"shira_values": TensorSpec(shape=(count,), init=zeros)}
    return Form(tensors=tensors, drawn=drawn, delta=delta, to_lora=None, scale=lambda *_: 1.0)


class _SparseProduct(torch.autograd.Function):
    """x S^T. S is whole while it is multiplied by: a weight of one linear, which GPUs multiply
    faster than they gather."""

    @staticmethod
    def forward(
        ctx: Any, x_TI: Tensor, values_N: Tensor, places_N: Tensor, out_features: int
    ) -> Tensor:
        ctx.save_for_backward(x_TI, values_N, places_N)
        ctx.out_features = out_features
        return x_TI @ _whole(values_N, places_N, out_features, x_TI.shape[-1]).t()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_TI, values_N, places_N = ctx.saved_tensors
        (grad_TO,), width = grads, x_TI.shape[-1]
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = grad_TO @ _whole(values_N, places_N, ctx.out_features, width)
        flat_TO, flat_TI = grad_TO.flatten(0, -2), x_TI.flatten(0, -2)
        parts = places_N.split(max(1, CHUNK // max(1, len(flat_TI))))
        sums = [(flat_TO[:, p // width] * flat_TI[:, p % width]).sum(dim=0) for p in parts]
        return grad_x, torch.cat(sums), None, None


def _whole(values_N: Tensor, places_N: Tensor, out_features: int, in_features: int) -> Tensor:
    flat = values_N.new_zeros(out_features * in_features)
    return flat.index_copy_(0, places_N, values_N).view(out_features, in_features)


SHIRA = MethodFactory(
    options=ShiraOptions, build=shira, summary="entries of the weights at places that stay"
)
