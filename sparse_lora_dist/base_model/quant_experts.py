"""Experts of a mixture-of-experts layer, with weights in 4 bits.

Experts are dequantised one at a time, and only those that tokens are routed to. This happens in
forward and again in backward.

Letters in shapes and at the end of names: T tokens, I in_features, O out_features, K experts per
token.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparse_lora_dist.base_model import nf4
from sparse_lora_dist.base_model.frozen_linear import FrozenMatmul


@dataclass(frozen=True, slots=True)
class Matrix:
    """One matrix of a stack of expert weights in 4 bits. Implements ``frozen_linear.Weighted``."""

    packed: nn.Parameter
    """Packed bytes of the whole stack, held in a parameter of the engine's dtype."""
    scales: nn.Parameter
    """Bytes of the scales of the whole stack, held in a parameter of the engine's dtype."""
    layout: nf4.Layout
    """Layout of the whole stack."""
    index: int
    """Index of the matrix in the stack."""
    bias: nn.Parameter | None = None
    """Always None, since expert matrices have no bias. ``FrozenMatmul`` reads it."""

    def weight_OI(self, dtype: torch.dtype) -> Tensor:
        """Return the matrix [O, I], dequantised to ``dtype``, while ZeRO-3 has it gathered."""
        packed, scales = self.packed.data.view(torch.uint8), self.scales.data.view(torch.uint8)
        return nf4.dequantize(
            nf4.parts_of(packed, scales, self.layout, self.index), self.layout, dtype
        )


class QuantExperts(nn.Module):
    """All experts of one layer, held in 4 bits. Replaces the experts module of transformers.

    The output of a token x is the sum over its experts e of

        weight_e down_e(act(gate_e(x)) * up_e(x))

    where weight_e is the router's weight of expert e for this token (0 if the token is not routed
    to e), gate_e, up_e and down_e are the expert's linear layers, and act is the activation
    function. The gate and up projections of an expert are stored as one matrix or as two, as in the
    base model's files.

    Args:
        num_experts: number of experts.
        act_fn: activation function.
        layouts: dict with the keys "gate_up_proj" and "down_proj": layout of each weight stack.
        parameters: dict with the same keys: sharded parameters (packed bytes, scales) of each
            stack.
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
        """Return the weighted sum of the experts' outputs.

        Args:
            x_TI: inputs of the tokens, shape [T, I].
            experts_TK: indices of each token's experts, shape [T, K].
            weights_TK: router weights of those experts, shape [T, K].

        Returns:
            Tensor of the shape and dtype of ``x_TI``.
        """
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
        """Return ``x_TI`` times the transposed weight of one expert in the stack ``name``.

        If an expert has several matrices in the stack, their results are concatenated along the
        last axis.

        Args:
            x_TI: inputs of the tokens that are routed to the expert.
            name: name of the stack, "gate_up_proj" or "down_proj".
            expert: index of the expert.
        """
        layout = self.layouts[name]
        count = layout.count // self.num_experts
        matrices = [self.matrix(name, expert * count + i) for i in range(count)]
        return torch.cat([FrozenMatmul.apply(x_TI, m) for m in matrices], dim=-1)  # type: ignore[no-untyped-call]

    def matrix(self, name: str, index: int) -> Matrix:
        """Return one matrix of a weight stack.

        Args:
            name: name of the stack, "gate_up_proj" or "down_proj".
            index: index of the matrix in the stack.
        """
        packed, scales = getattr(self, name), getattr(self, f"{name}_scales")
        return Matrix(packed, scales, self.layouts[name], index)
