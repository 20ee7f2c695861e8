"""Frozen linear layers that save no weight for backward.

The matmuls of torch and bitsandbytes save a view of the gathered weight for backward. Under ZeRO-3
without activation checkpointing, this keeps the whole base in the memory of every rank. Here
backward reads the weight from the layer again, after ZeRO-3's pre-backward hook has gathered it.

Letters in shapes and at the end of names: T tokens (any number of leading axes), I in_features, O
out_features.
"""

from functools import cache
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_lora_dist.base_model import nf4


class FrozenLinear(nn.Module):
    """Linear layer y = x W^T + b with frozen W and b, both in the DeepSpeed engine's dtype.

    Args:
        in_features: number of input features (I).
        out_features: number of output features (O).
        weight: sharded parameter W of shape [O, I].
        bias: sharded parameter b of shape [O], or None.
    """

    def __init__(
        self, in_features: int, out_features: int, weight: nn.Parameter, bias: nn.Parameter | None
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = weight
        self.bias: nn.Parameter | None
        self.register_parameter("bias", bias)

    def weight_OI(self, dtype: torch.dtype) -> Tensor:
        """Return the weight as a tensor of shape [O, I] in ``dtype``.

        Call it only while ZeRO-3 has the weight gathered: in the layer's forward and backward, or
        inside ``zero3.parameters.gathered``.
        """
        return self.weight.data.to(dtype)

    def forward(self, x_TI: Tensor) -> Tensor:
        y_TO: Tensor = FrozenMatmul.apply(x_TI, self)  # type: ignore[no-untyped-call]
        return y_TO

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


class QuantLinear(FrozenLinear):
    """Frozen linear layer whose weight is held in 4 bits (NF4 or FP4), as packed bytes and scales.

    ``weight`` is not the weight matrix: it holds the packed 4-bit bytes, in a 1-D parameter whose
    dtype is the engine's (bf16). ``scales`` holds the bytes of the scales in the same way. They
    have the engine's dtype so that DeepSpeed shards and gathers them like any parameter. Never do
    arithmetic on them or call ``.to(dtype)``, since their values as bf16 numbers mean nothing. To
    get the weight matrix, call ``weight_OI(dtype)``, which dequantises it at each call.

    Args:
        layout: layout of the matrix in packed bytes and scales.
        weight: the parameters (packed, scales), from ``nf4_shard.quantized_parameters``.
        bias: sharded parameter of shape [O], or None.
    """

    def __init__(
        self,
        layout: nf4.Layout,
        weight: tuple[nn.Parameter, nn.Parameter],
        bias: nn.Parameter | None,
    ) -> None:
        packed, scales = weight
        super().__init__(layout.shape[1], layout.shape[0], packed, bias)
        self.layout = layout
        self.scales = scales

    def weight_OI(self, dtype: torch.dtype) -> Tensor:
        parts = getattr(self.weight, "parts", None) or self._cut()
        return nf4.dequantize(parts, self.layout, dtype)

    def _cut(self) -> nf4.Parts:
        packed, scales = self.weight.data.view(torch.uint8), self.scales.data.view(torch.uint8)
        parts = nf4.parts_of(packed, scales, self.layout)
        if "weight" in self._buffers and "scales" in self._buffers:  # whole, so they never change
            self.weight.parts = parts  # type: ignore[attr-defined]  # goes with the tensor
        return parts


class Weighted(Protocol):
    """Interface that ``FrozenMatmul`` needs: a layer or expert with a weight matrix and a bias.

    ``FrozenLinear`` and ``quant_experts.Matrix`` implement it.
    """

    bias: nn.Parameter | None

    def weight_OI(self, dtype: torch.dtype) -> Tensor:
        """Return the weight as a tensor of shape [O, I] in ``dtype``, while it is gathered."""


class FrozenMatmul(torch.autograd.Function):
    """Autograd function of a frozen linear layer, which does not save the weight W for backward.

    Forward computes x W^T + b. Backward computes the gradient of x as g W, where g is the gradient
    of the output. Both read W from the layer. W and b get no gradient.

    Call ``FrozenMatmul.apply(x_TI, layer)`` with inputs of shape [T, I]. It returns a tensor of
    shape [T, O] and the dtype of ``x_TI``.
    """

    @staticmethod
    def forward(ctx: Any, x_TI: Tensor, layer: Weighted) -> Tensor:
        ctx.layer = layer
        return output_of(layer, x_TI)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return input_gradient_of(ctx.layer, grads[0]), None


def output_of(layer: Weighted, x_TI: Tensor) -> Tensor:
    """Return x W^T + b, in the dtype of ``x_TI``. ZeRO-3 must have gathered W and b."""
    bias = None if layer.bias is None else layer.bias.data
    return F.linear(x_TI, layer.weight_OI(x_TI.dtype), bias)


def input_gradient_of(layer: Weighted, grad_TO: Tensor) -> Tensor:
    """Return g W, the gradient of the input, in the dtype of g, the gradient of the output. ZeRO-3
    must have gathered W."""
    dtype = fast_dtype(grad_TO)
    w_OI = layer.weight_OI(grad_TO.dtype).to(dtype)
    return (grad_TO.to(dtype) @ w_OI).to(grad_TO.dtype)


def fast_dtype(t: Tensor) -> torch.dtype:
    """Return the dtype in which backward should multiply ``t`` with a weight.

    It is the dtype of ``t``, with one exception: fp32 for bf16 on a CPU without bf16 instructions.
    There torch multiplies bf16 in a plain loop, which is 80 times slower than fp32 for an
    untransposed weight. Forward keeps bf16, although it is 8 times slower, so that its results stay
    bit-identical to those of transformers.
    """
    plain_loop = t.device.type == "cpu" and not _cpu_multiplies_bf16()
    return torch.float32 if plain_loop and t.dtype == torch.bfloat16 else t.dtype


@cache
def _cpu_multiplies_bf16() -> bool:
    return not torch.backends.mkldnn.is_available() or bool(
        torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )
