"""SBoRA: fix one of LoRA's factors to a choice of coordinates, so few columns or rows change.

    fa:  y = W x + (alpha / R) B x[chosen]              B (O x R) trains, R columns of W change
    fb:  y = W x, y[chosen] += (alpha / R) A x          A (R x I) trains, R rows of W change

The other factor is R different rows (fa) or columns (fb) of the identity matrix. The trained factor
starts at zero.

Nothing is decided: the chosen coordinates are drawn from the seed and the linear's name. They are
used as indices, so the fixed factor is never a matrix in memory.

This implementation differs from the released code (github.com/cityuhkai/SBoRA, 8870499): there
coordinates are drawn by Python's random module and stored as a frozen matrix.

- **Optimizer state:** 8 bytes x trained entries, R O (fa) or R I (fb) a linear; 0.54 x LoRA's of
  the same rank (Llama-2-7B, all linears, fa).
- **Statistics:** none.
- **Exports as:** PEFT LoRA, merged model or sparse delta.
- **Choose it when:** an update is to touch few columns or rows of the weights, or the optimizer
  state is to take about half of LoRA's memory.
- **Paper:** Po et al. 2024, arXiv:2407.05413.

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
    """SBoRA: trains some columns or rows of each weight"""

    sbora_side: Literal["fa", "fb"] = "fa"
    """Factor that is fixed: fa (A; --rank columns of each weight change) or fb (B; --rank rows
    change)."""


def sbora(options: SBoraOptions, context: RunContext) -> Method:
    """Return the `Method` that describes SBoRA to training, planning and export.

    Args:
        options: Value of --sbora_side.
        context: Adapted linears of the run.

    Raises:
        ValueError: A weight has fewer columns (side fa) or rows (side fb) than --rank.
    """
    build = from_columns if options.sbora_side == "fa" else to_rows
    for site in context.sites:
        sides = {"fa": (site.in_features, "columns"), "fb": (site.out_features, "rows")}
        side, lines = sides[options.sbora_side]
        if site.rank > side:
            raise ValueError(
                f"{site.name} is {site.out_features} x {site.in_features}. --rank {site.rank} is "
                f"more than its {side} {lines}. Take --rank {side} or less"
            )
    return Method(name="sbora", form=build)


def from_columns(site: Site) -> Form:
    """Return the form of ``site`` for `--sbora_side fa`: y_TO = scale * x_TI[:, chosen] B^T.

    ``chosen`` are the indices of site.rank input features, drawn from the seed. Only B trains.
    """

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
    """Return the form of side fb at ``site``: the delta y_TO is scale * x A^T at the chosen
    outputs, 0 elsewhere.

    Only A is trained; ``chosen`` are the indices of site.rank output features.
    """

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
    options=SBoraOptions,
    build=sbora,
    summary="trains few columns or rows of the weights",
    example="--sbora_side fa",
)
