"""LoRA-Mini: make each factor of LoRA a product of a large frozen and a small trained matrix.

    y = W x + (alpha / R) B_aux B_tr A_tr A_aux x

B_aux (O x N) and A_aux (N x I) are random and frozen; A_tr (R x N) starts random, B_tr (N x R) at
zero. 2 R N parameters train per linear.

Nothing is decided. The frozen factors are computed anew from the seed at every use
(`hashed_random.py`), and stored nowhere.

This implementation may differ from the paper, whose code was not released and whose initial values
and sizes are not certain:

- A_aux starts from U(-1/sqrt(I), 1/sqrt(I)), as LoRA's A does. B_aux and A_tr start from
  U(-sqrt(3/N), sqrt(3/N)), so that a product with them keeps the variance of its input.
- Both inner sizes are one number, `lora_mini_size`.

In short:

- **Optimizer state:** 8 bytes x trained entries, `--rank` x 2 `lora_mini_size` a linear.
- **Statistics:** none.
- **Exports as:** PEFT LoRA of rank R, merged model or sparse delta.
- **Choose it when:** what trains and is saved must be tiny; every forward computes the frozen
  factors and multiplies by them.
- **Paper:** Singh et al. 2024, arXiv:2411.15804.

Shapes: T tokens, I in_features, O out_features, R rank, N inner size.
"""

from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor

from sparse_lora_dist.methods.protocol.form import Form, Site, Tensors, TensorSpec, zeros
from sparse_lora_dist.methods.protocol.method import Method, MethodFactory, RunContext
from sparse_lora_dist.methods.shared.hashed_random import uniform


@dataclass(frozen=True, kw_only=True)
class LoraMiniOptions:
    """LoRA-Mini: small factors between large frozen ones"""

    lora_mini_size: int = 64
    """Number of features between a frozen and a trained factor, at least 1; a linear trains 2 x
    --rank x lora_mini_size parameters."""

    def __post_init__(self) -> None:
        if self.lora_mini_size < 1:
            raise ValueError(f"--lora_mini_size must be at least 1, got {self.lora_mini_size}")


def lora_mini(options: LoraMiniOptions, context: RunContext) -> Method:
    """Return the `Method` that describes LoRA-Mini to training, planning and export.

    Args:
        options: Value of --lora_mini_size.
        context: Unused.
    """
    size = options.lora_mini_size

    def form(site: Site) -> Form:
        def drawn(seed: int, device: torch.device) -> dict[str, Tensor]:
            a_shape, b_shape = (size, site.in_features), (site.out_features, size)
            return {
                "aux_a": uniform(a_shape, site.in_features**-0.5, seed, device),
                "aux_b": uniform(b_shape, sqrt(3 / size), seed + 1, device),
            }

        tensors = {
            "lora_a": TensorSpec(shape=(site.rank, size), init=of_one_size),
            "lora_b": TensorSpec(shape=(size, site.rank), init=zeros),
        }
        return Form(tensors=tensors, drawn=drawn, delta=nested, to_lora=multiplied)

    return Method(name="lora_mini", form=form)


def of_one_size(t: Tensor, generator: torch.Generator) -> None:
    """Fill ``t`` in place from U(-sqrt(3/n), sqrt(3/n)), where n is the length of its last axis.

    The variance is 1/n, so that a product with ``t`` keeps the variance of its input.

    Args:
        t: Tensor to fill.
        generator: Source of the random values.
    """
    bound = sqrt(3 / t.shape[-1])
    t.uniform_(-bound, bound, generator=generator)


def nested(x_TI: Tensor, tensors: Tensors, scale: float) -> Tensor:
    """Return what the site adds to the linear's output: scale * x A_aux^T A_tr^T B_tr^T B_aux^T.

    Args:
        x_TI: Input of the linear, [T tokens, in_features].
        tensors: The frozen ``aux_a`` (A_aux) and ``aux_b`` (B_aux), and the trained ``lora_a``
            (A_tr) and ``lora_b`` (B_tr).
        scale: Scale of the delta.

    Returns:
        The delta, [T, out_features].
    """
    z_TR = x_TI @ tensors["aux_a"].to(x_TI.dtype).t() @ tensors["lora_a"].t() * scale
    return z_TR @ tensors["lora_b"].t() @ tensors["aux_b"].to(x_TI.dtype).t()


def multiplied(tensors: Tensors) -> tuple[Tensor, Tensor]:
    """Return (A_tr A_aux, B_aux B_tr), [R, I] and [O, R], the plain LoRA pair that gives the same
    delta."""
    a_RN, b_NR = tensors["lora_a"], tensors["lora_b"]
    return a_RN @ tensors["aux_a"].to(a_RN.dtype), tensors["aux_b"].to(b_NR.dtype) @ b_NR


LORA_MINI = MethodFactory(
    options=LoraMiniOptions,
    build=lora_mini,
    summary="trains small factors between large frozen ones",
    example="--lora_mini_size 16",
)
