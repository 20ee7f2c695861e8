"""The NF4 block layout: which bytes come from which weights, and what the scales hold.

bitsandbytes does the arithmetic; this file only says where things lie, so that a rank can quantise
any range of a weight and get the bytes that ``bitsandbytes.functional.quantize_4bit`` gives for the
whole of it (Dettmers et al. 2023, QLoRA, arXiv:2305.14314, section 3).

A weight W_OI is flattened to n elements and cut into blocks of 64. Two weights make a byte, the
first in the high half. The scales of a tensor are one run of bytes:

    plain          absmax fp32 [blocks]
    double quant   nested absmax fp32 [ceil(blocks / 256)] | offset fp32 [1] | absmax u8 [blocks]

Shapes: N flat elements, B blocks, O out_features, I in_features.
"""

from dataclasses import dataclass

import bitsandbytes.functional as bnb
import torch
from torch import Tensor

BLOCK = 64
NESTED_BLOCK = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """Where the bytes of one quantised weight lie."""

    shape: tuple[int, int]
    double_quant: bool

    @property
    def numel(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def num_blocks(self) -> int:
        return -(-self.numel // BLOCK)

    @property
    def packed_bytes(self) -> int:
        """Half a byte a weight; an odd last weight fills its byte alone."""
        return -(-self.numel // 2)

    @property
    def num_nested(self) -> int:
        return -(-self.num_blocks // NESTED_BLOCK)

    @property
    def scale_bytes(self) -> int:
        if self.double_quant:
            return 4 * self.num_nested + 4 + self.num_blocks
        return 4 * self.num_blocks

    def weights_of_bytes(self, start: int, stop: int) -> tuple[int, int]:
        """Flat range of whole blocks that packed bytes [start, stop) need."""
        if start >= stop:
            return self.numel, self.numel
        return 2 * start // BLOCK * BLOCK, min(-(-2 * stop // BLOCK) * BLOCK, self.numel)

    def blocks_of_bytes(self, start: int, stop: int) -> tuple[int, int]:
        """Blocks whose first weight lies in packed bytes [start, stop): each has one owner."""
        return -(-2 * start // BLOCK), -(-2 * stop // BLOCK)


def quantize(w_N: Tensor) -> tuple[Tensor, Tensor]:
    """(packed uint8 [ceil(N / 2)], absmax fp32 [B]) of a range that starts where a block does."""
    if w_N.numel() == 0:
        return w_N.new_empty(0, dtype=torch.uint8), w_N.new_empty(0, dtype=torch.float32)
    packed, state = bnb.quantize_4bit(w_N, blocksize=BLOCK, quant_type="nf4")
    return packed.flatten(), state.absmax


def scale_bytes(absmax_B: Tensor, offset: Tensor, layout: Layout) -> Tensor:
    """The scales of a whole tensor as bytes, uint8 [layout.scale_bytes].

    ``offset`` is ``absmax_B.mean()``, taken by one rank for all: a sum of partial means differs by
    an ulp, which changes every nested scale.
    """
    if not layout.double_quant:
        return absmax_B.contiguous().view(torch.uint8)
    quantized_B, nested = bnb.quantize_blockwise(absmax_B - offset, blocksize=NESTED_BLOCK)
    return torch.cat(
        [nested.absmax.view(torch.uint8), offset.reshape(1).view(torch.uint8), quantized_B]
    )


def absmax_of(scales: Tensor, layout: Layout) -> Tensor:
    """absmax fp32 [B] back from the bytes of ``scale_bytes``."""
    # The clones are small, and aligned: ZeRO-3 may gather these bytes to an odd place inside a
    # larger buffer.
    if not layout.double_quant:
        return scales[: layout.scale_bytes].clone().view(torch.float32)
    nested_end = 4 * layout.num_nested
    nested = bnb.QuantState(
        absmax=scales[:nested_end].clone().view(torch.float32),
        code=dynamic_map(scales.device),
        blocksize=NESTED_BLOCK,
        dtype=torch.float32,
    )
    quantized_B = scales[nested_end + 4 : layout.scale_bytes]
    offset = scales[nested_end : nested_end + 4].clone().view(torch.float32)
    return bnb.dequantize_blockwise(quantized_B, nested) + offset


def dynamic_map(device: torch.device) -> Tensor:
    """bitsandbytes' signed 8-bit code, kept by it after the first use."""
    if "dynamic" not in bnb.name2qmap:
        bnb.name2qmap["dynamic"] = bnb.create_dynamic_map()
    if bnb.name2qmap["dynamic"].device != device:
        bnb.name2qmap["dynamic"] = bnb.name2qmap["dynamic"].to(device)
    code: Tensor = bnb.name2qmap["dynamic"]
    return code


def dequantize(packed: Tensor, scales: Tensor, layout: Layout, dtype: torch.dtype) -> Tensor:
    """w_OI in ``dtype`` from the whole tensor's bytes (each uint8, tail padding allowed)."""
    state = bnb.QuantState(
        absmax=absmax_of(scales, layout),
        shape=torch.Size(layout.shape),
        blocksize=BLOCK,
        quant_type="nf4",
        dtype=dtype,
    )
    w_OI: Tensor = bnb.dequantize_4bit(packed[: layout.packed_bytes].view(-1, 1), state)
    return w_OI
