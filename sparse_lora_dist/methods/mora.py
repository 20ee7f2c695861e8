"""MoRA: one square matrix in place of two thin ones, between a fixed compression of the input and a
fixed decompression.

Jiang et al. 2024, arXiv:2405.12130. y = decompress(M compress(x)), M (h x h) zero at first,
h = round(sqrt((I + O) R)), so that M has as many parameters as a LoRA of rank R, and an update of
rank up to h. Without a scale: --alpha has no meaning here.

Type 1, "sharing", for large ranks: x, gone on with from its front up to whole groups of h, is
summed over its groups; the h results are repeated along y. Type 6, "rotary", for small ones: group
g of x is turned by the angles of position g of a rotary embedding, M is applied to every group,
and the results stand one after another in y; h is even.

The update is no low-rank pair, so it is exported as a merged model (the released fork,
github.com/kongds/MoRA, de5df31, cannot merge type 6 where I <= h; here nothing is special there).

Shapes: T tokens, I in_features, O out_features, H side of M, G groups.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import sqrt
from typing import Literal

import torch
from torch import Tensor

from sparse_lora_dist.methods.base import Method, MethodFactory, Plan
from sparse_lora_dist.methods.form import Form, Site, Tensors, TensorSpec, zeros

THETA = 10000.0
"""Of rotary embeddings."""


@dataclass(frozen=True, kw_only=True)
class MoraOptions:
    """MoRA: a square matrix between fixed maps"""

    mora_type: Literal[1, 6] = 6
    """How input and output are mapped: 1 (sums and repeats, for large --rank) or 6 (rotated
    groups, for small)."""


def mora(options: MoraOptions, plan: Plan) -> Method:
    """Nothing is decided."""
    return Method(name="mora", form=shared if options.mora_type == 1 else rotated)


def side_of(site: Site) -> int:
    """H, of the square with as many entries as a low-rank pair has."""
    return int(sqrt((site.in_features + site.out_features) * site.rank) + 0.5)


def shared(site: Site) -> Form:
    """Type 1: y_o = sum over g of M[o mod H] x_g"""
    side = side_of(site)

    def delta(x_TI: Tensor, tensors: Tensors, scale: float) -> Tensor:
        x_TH = grouped(x_TI, side).sum(dim=-2)
        return repeated(x_TH @ tensors["mora_m"].t(), site.out_features)

    return square(side, delta)


def rotated(site: Site) -> Form:
    """Type 6: y of group g is M rotate_g(x_g)"""
    side = side_of(site) // 2 * 2

    def delta(x_TI: Tensor, tensors: Tensors, scale: float) -> Tensor:
        x_TGH = turned(grouped(x_TI, side))
        return repeated((x_TGH @ tensors["mora_m"].t()).flatten(-2), site.out_features)

    return square(side, delta)


def square(side: int, delta: Callable[[Tensor, Tensors, float], Tensor]) -> Form:
    """M alone trains, and nothing scales it."""
    tensors = {"mora_m": TensorSpec(shape=(side, side), init=zeros)}
    return Form(tensors=tensors, delta=delta, to_lora=None, scale=lambda *_: 1.0)


def grouped(x_TI: Tensor, side: int) -> Tensor:
    """x_TGH, the last group filled up from the front of x."""
    width = x_TI.shape[-1]
    places = torch.arange(-(-width // side) * side, device=x_TI.device) % width
    x_TGH: Tensor = x_TI.index_select(-1, places).unflatten(-1, (-1, side))
    return x_TGH


def repeated(y_TN: Tensor, width: int) -> Tensor:
    """As often as it takes, and cut."""
    places = torch.arange(width, device=y_TN.device) % y_TN.shape[-1]
    return y_TN.index_select(-1, places)


def turned(x_TGH: Tensor) -> Tensor:
    """Pair (j, j + H/2) of group g by the angle g * THETA^(-2 j / H)."""
    groups, side = x_TGH.shape[-2:]
    j_H = torch.arange(0, side, 2, device=x_TGH.device, dtype=torch.float32)
    angles_GH = torch.outer(torch.arange(groups, device=x_TGH.device), THETA ** (-j_H / side))
    cos_GH, sin_GH = angles_GH.cos().to(x_TGH.dtype), angles_GH.sin().to(x_TGH.dtype)
    first, second = x_TGH.chunk(2, dim=-1)
    return torch.cat([first * cos_GH - second * sin_GH, second * cos_GH + first * sin_GH], dim=-1)


MORA = MethodFactory(
    options=MoraOptions, build=mora, summary="a square matrix, of a high rank for the cost"
)
