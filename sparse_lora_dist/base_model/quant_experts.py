"""Experts of a mixture-of-experts layer, with weights in 4 bits.

One expert is dequantised at a time, if tokens are routed to it, in forward and again in backward.

Shapes: T tokens, I in_features, K experts a token, E experts.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparse_lora_dist.base_model import nf4
from sparse_lora_dist.base_model.frozen_linear import FrozenMatmul


@dataclass(frozen=True, slots=True)
class Matrix:
    """One matrix of a stack of 4-bit expert weights."""

    packed: nn.Parameter
    """Packed bytes of the whole stack, in the engine's dtype."""
    scales: nn.Parameter
    """Bytes of the scales of the whole stack, in the engine's dtype."""
    layout: nf4.Layout
    index: int
    """Number of the matrix in the stack."""
    bias: nn.Parameter | None = None

    def weight_OI(self, dtype: torch.dtype) -> Tensor:
        """Return the dequantised matrix. Valid only while ZeRO-3 has the stack gathered."""
        packed, scales = self.packed.data.view(torch.uint8), self.scales.data.view(torch.uint8)
        return nf4.dequantize(packed, scales, self.layout, dtype, self.index)


class QuantExperts(nn.Module):
    """y_TI = sum over a token's experts e of weight_e down_e(act(gate_e(x)) * up_e(x)).

    Gate and up of an expert are one matrix or two, as in the base files.

    Args:
        num_experts: E.
        act_fn: activation function.
        layouts: "gate_up_proj" and "down_proj" -> layout of the stack.
        parameters: "gate_up_proj" and "down_proj" -> sharded parameters (packed, scales).
    """

    def __init__(
        self,
        num_experts: int,
        act_fn: Callable[[Tensor], Tensor],
        layouts: dict[str, nf4.Layout],
        parameters: dict[str, tuple[nn.Parameter, nn.Parameter]],
    ) -> None:
        super().__init__()
        self.num_experts, self.act_fn, self.layouts = num_experts, act_fn, layouts
        # Parameters of this module, not of submodules: ZeRO-3 gathers the parameters of a module
        # when its forward runs.
        for name, (packed, scales) in parameters.items():
            self.register_parameter(name, packed)
            self.register_parameter(f"{name}_scales", scales)

    def forward(self, x_TI: Tensor, experts_TK: Tensor, weights_TK: Tensor) -> Tensor:
        y_TI = torch.zeros_like(x_TI)
        for expert in experts_TK.unique().tolist():
            if expert == self.num_experts:  # transformers' value for "no expert on this device"
                continue
            token, place = torch.where(experts_TK == expert)
            gate, up = self._times(x_TI[token], "gate_up_proj", expert).chunk(2, dim=-1)
            own = self._times(self.act_fn(gate) * up, "down_proj", expert)
            own = own * weights_TK[token, place, None]
            y_TI = y_TI.index_add(0, token, own.to(y_TI.dtype))
        return y_TI

    def _times(self, x_TI: Tensor, name: str, expert: int) -> Tensor:
        layout = self.layouts[name]
        count = layout.count // self.num_experts
        matrices = [self.matrix(name, expert * count + i) for i in range(count)]
        return torch.cat([FrozenMatmul.apply(x_TI, m) for m in matrices], dim=-1)  # type: ignore[no-untyped-call]

    def matrix(self, name: str, index: int) -> Matrix:
        """Return matrix ``index`` of the stack ``name``, "gate_up_proj" or "down_proj"."""
        packed, scales = getattr(self, name), getattr(self, f"{name}_scales")
        return Matrix(packed, scales, self.layouts[name], index)
