"""A base whose rows do not end where blocks of 64 weights end (bitsandbytes 0.50.2 dequantises it
wrongly on a CPU, by 24% of its norm for 96 columns). Values are counted from NF4's table."""

import pytest
import torch
from torch import Tensor

from sparse_lora_dist.base_model import nf4

TABLE = torch.tensor(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ]
)
"""The 16 values of NF4 (QLoRA, Dettmers et al. 2023, arXiv 2305.14314, appendix E)."""
WIDTHS = (16, 32, 48, 60, 64, 72, 80, 96, 112, 128, 144, 160, 192, 208, 2, 37)


def by_hand(w_OI: Tensor, block: int) -> Tensor:
    flat = w_OI.flatten()
    padded = torch.cat([flat, flat.new_zeros(-len(flat) % block)]).view(-1, block)
    absmax = padded.abs().amax(1, keepdim=True)
    nearest = ((padded / absmax).unsqueeze(-1) - TABLE).abs().argmin(-1)
    return (TABLE[nearest] * absmax).flatten()[: len(flat)].view_as(w_OI)


@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize("columns", WIDTHS)
def test_a_matrix_of_any_width_comes_back_as_its_table_says(columns: int, block: int) -> None:
    torch.manual_seed(columns)
    w_OI = torch.randn(24, columns)
    layout = nf4.Layout(shape=(24, columns), double_quant=False, block=block)
    packed, absmax_B = nf4.quantize(w_OI.flatten(), layout, 0)
    scales = nf4.scale_bytes(absmax_B, nf4.offsets(absmax_B, layout), layout)
    found_OI = nf4.dequantize(nf4.parts_of(packed, scales, layout), layout, torch.float32)
    torch.testing.assert_close(found_OI, by_hand(w_OI, block), rtol=0, atol=1e-6)
    in_bf16 = nf4.dequantize(nf4.parts_of(packed, scales, layout), layout, torch.bfloat16)
    torch.testing.assert_close(in_bf16.float(), found_OI, rtol=2**-8, atol=0)
