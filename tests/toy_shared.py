"""The toy method on a pair that all linears share, of which each has its own use."""

from dataclasses import replace

import torch
from torch import Tensor

from sparse_lora_dist.methods.protocol.form import Form, Site, Tensors, TensorSpec, low_rank_delta
from sparse_lora_dist.methods.protocol.method import Method, MethodFactory, Plan
from tests.toy_method import ToyOptions, toy


def of_any_size(t: Tensor, generator: torch.Generator) -> None:
    """Not zero, so that everything has a gradient at the first step."""
    t.normal_(std=0.1, generator=generator)


def form(site: Site) -> Form:
    """y = scale * x A^T diag(c) B^T, with A and B of all and c of this one."""
    shapes = {"lora_a": (site.rank, site.in_features), "lora_b": (site.out_features, site.rank)}
    shared = {k: TensorSpec(shape=s, init=of_any_size, shared=True) for k, s in shapes.items()}
    own = {"toy_c": TensorSpec(shape=(site.rank,), init=of_any_size)}
    return Form(tensors=shared | own, delta=delta, to_lora=pair)


def pair(tensors: Tensors) -> tuple[Tensor, Tensor]:
    """(A, B diag(c))"""
    return tensors["lora_a"], tensors["lora_b"] * tensors["toy_c"]


def delta(x_TI: Tensor, tensors: Tensors, scale: float) -> Tensor:
    """That of the pair."""
    a_RI, b_OR = pair(tensors)
    return low_rank_delta(x_TI, {"lora_a": a_RI, "lora_b": b_OR}, scale)


def toy_shared(options: ToyOptions, plan: Plan) -> Method:
    """Entries of what is shared die as those of anything else."""
    return replace(toy(options, plan), name="toy_shared", form=form)


TOY_SHARED = MethodFactory(options=ToyOptions, build=toy_shared, summary="one pair for all linears")
