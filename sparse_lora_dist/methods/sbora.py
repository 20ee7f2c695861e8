"""SBoRA: one of LoRA's factors is a choice of coordinates, so the update touches few columns, or
few rows, of the weight.

Po et al. 2024, arXiv:2407.05413. FA: A is R different rows of the identity, and B (O x R) trains
from zero, so R columns of W change:  y = s x[idx] B^T.  FB: B is R different columns of the
identity, and A (R x I) trains from zero, so R rows change:  y[idx] = s x A^T.  s = alpha / R.

Coordinates are drawn from the seed and the linear's name, and gathered or scattered by index.
Where we differ from the released code (github.com/cityuhkai/SBoRA, 8870499): there they are drawn
by Python's random module and kept as a frozen matrix.

Shapes: T tokens, I in_features, O out_features, R rank.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from sparse_lora_dist.methods.protocol.form import Form, Site, Tensors, TensorSpec, zeros
from sparse_lora_dist.methods.protocol.method import Method, MethodFactory, RunContext
from sparse_lora_dist.methods.shared.hashed_random import distinct


@dataclass(frozen=True, kw_only=True)
class SBoraOptions:
    """SBoRA: columns or rows of the weight train"""

    sbora_side: Literal["fa", "fb"] = "fa"
    """Factor that is fixed: fa (A; --rank columns of each weight change) or fb (B; --rank rows
    change)."""


def sbora(options: SBoraOptions, context: RunContext) -> Method:
    """Nothing is decided.

    Raises:
        ValueError: a weight has fewer columns, or rows, than are to be chosen.
    """
    build = from_columns if options.sbora_side == "fa" else to_rows
    for site in context.sites:
        sides = {"fa": (site.in_features, "columns"), "fb": (site.out_features, "rows")}
        side, lines = sides[options.sbora_side]
        if site.rank > side:
            raise ValueError(
                f"{site.name} is {site.out_features} x {site.in_features}: --rank {site.rank} is "
                f"more than its {side} {lines}; take --rank {side} or less"
            )
    return Method(name="sbora", form=build)


def from_columns(site: Site) -> Form:
    """FA: y_TO = scale * x[:, chosen] B^T"""

    def drawn(seed: int, device: torch.device) -> dict[str, Tensor]:
        return {"chosen": distinct(site.rank, site.in_features, seed, device)}

    def delta(x_TI: Tensor, tensors: Tensors, scale: float) -> Tensor:
        return x_TI.index_select(-1, tensors["chosen"]) * scale @ tensors["lora_b"].t()

    def to_lora(tensors: Tensors) -> tuple[Tensor, Tensor]:
        b_OR = tensors["lora_b"]
        return one_hot(tensors["chosen"], site.in_features).to(b_OR.dtype), b_OR

    b_shape = (site.out_features, site.rank)
    tensors = {"lora_b": TensorSpec(shape=b_shape, init=zeros)}
    return Form(tensors=tensors, drawn=drawn, delta=delta, to_lora=to_lora)


def to_rows(site: Site) -> Form:
    """FB: y_TO is zero, but for y[:, chosen] = scale * x A^T"""

    def drawn(seed: int, device: torch.device) -> dict[str, Tensor]:
        return {"chosen": distinct(site.rank, site.out_features, seed, device)}

    def delta(x_TI: Tensor, tensors: Tensors, scale: float) -> Tensor:
        z_TR = x_TI @ tensors["lora_a"].t() * scale
        y_TO = z_TR.new_zeros(*z_TR.shape[:-1], site.out_features)
        return y_TO.index_copy(-1, tensors["chosen"], z_TR)

    def to_lora(tensors: Tensors) -> tuple[Tensor, Tensor]:
        a_RI = tensors["lora_a"]
        return a_RI, one_hot(tensors["chosen"], site.out_features).t().to(a_RI.dtype)

    a_shape = (site.rank, site.in_features)
    tensors = {"lora_a": TensorSpec(shape=a_shape, init=zeros)}
    return Form(tensors=tensors, drawn=drawn, delta=delta, to_lora=to_lora)


SBORA = MethodFactory(
    options=SBoraOptions, build=sbora, summary="few columns, or rows, of the weights train"
)
