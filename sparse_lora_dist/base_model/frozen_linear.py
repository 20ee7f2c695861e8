"""Frozen linears that keep nothing of their weight between forward and backward.

bitsandbytes' matmul, and torch's own, save a view of the gathered weight for backward; under ZeRO-3
without activation checkpointing the whole base is then alive on every rank. Here backward reads the
weight again from the layer, where ZeRO-3's pre-backward hook has gathered it by then.

Shapes: T tokens (any leading axes), I in_features, O out_features.
"""

from functools import cache
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_lora_dist.base_model import nf4


class FrozenLinear(nn.Module):
    """y_TO = x_TI W^T + b with W and b frozen, W in the engine's dtype."""

    def __init__(
        self, in_features: int, out_features: int, weight: nn.Parameter, bias: nn.Parameter | None
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = weight
        self.bias: nn.Parameter | None
        self.register_parameter("bias", bias)

    def weight_OI(self, dtype: torch.dtype) -> Tensor:
        """The weight, valid while ZeRO-3 has it gathered."""
        return self.weight.data.to(dtype)

    def forward(self, x_TI: Tensor) -> Tensor:
        y_TO: Tensor = FrozenMatmul.apply(x_TI, self)  # type: ignore[no-untyped-call]
        return y_TO

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


class QuantLinear(FrozenLinear):
    """The same over NF4: packed weight and scales are two parameters of bytes.

    The bytes wear the engine's dtype, so that DeepSpeed moves them as it moves everything.
    ``layout`` says what the bytes mean. Never do arithmetic on the two, nor ``.to(dtype)``: they
    are not numbers.
    """

    def __init__(
        self,
        layout: nf4.Layout,
        weight: tuple[nn.Parameter, nn.Parameter],
        bias: nn.Parameter | None,
    ) -> None:
        """``weight``: packed bytes and scales."""
        packed, scales = weight
        super().__init__(layout.shape[1], layout.shape[0], packed, bias)
        self.layout = layout
        self.scales = scales

    def weight_OI(self, dtype: torch.dtype) -> Tensor:
        packed, scales = self.weight.data.view(torch.uint8), self.scales.data.view(torch.uint8)
        return nf4.dequantize(packed, scales, self.layout, dtype)


class Weighted(Protocol):
    """What has a weight to multiply with while ZeRO-3 has it gathered."""

    bias: nn.Parameter | None

    def weight_OI(self, dtype: torch.dtype) -> Tensor:
        """The weight, made anew at each call."""


class FrozenMatmul(torch.autograd.Function):
    """x W^T + b and, backward, g W: W comes from the layer both times."""

    @staticmethod
    def forward(ctx: Any, x_TI: Tensor, layer: Weighted) -> Tensor:
        ctx.layer = layer
        bias = None if layer.bias is None else layer.bias.data
        return F.linear(x_TI, layer.weight_OI(x_TI.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad_TO,) = grads
        dtype = fast_dtype(grad_TO)
        w_OI = ctx.layer.weight_OI(grad_TO.dtype).to(dtype)
        return (grad_TO.to(dtype) @ w_OI).to(grad_TO.dtype), None


def fast_dtype(t: Tensor) -> torch.dtype:
    """What backward multiplies tensors like ``t`` in: fp32 where a CPU has no instructions for
    bf16. torch then has a plain loop, 80 times slower than fp32 for an untransposed weight.

    Forward stays as it is, 8 times slower: it is bit for bit that of transformers.
    """
    plain_loop = t.device.type == "cpu" and not _cpu_multiplies_bf16()
    return torch.float32 if plain_loop and t.dtype == torch.bfloat16 else t.dtype


@cache
def _cpu_multiplies_bf16() -> bool:
    return not torch.backends.mkldnn.is_available() or bool(
        torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )
