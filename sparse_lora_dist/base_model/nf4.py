"""The 4-bit block layout: which bytes come from which weights, and what the scales hold.

bitsandbytes does the arithmetic; this file only says where things lie, so that a rank can quantise
any range of a weight and get the bytes that ``bitsandbytes.functional.quantize_4bit`` gives for the
whole of it (Dettmers et al. 2023, QLoRA, arXiv:2305.14314, section 3).

A matrix W_OI is flattened to n elements and cut into blocks, of 64 unless a checkpoint that came
quantised says otherwise. Two weights make a byte, the first in the high half. Experts are E
matrices, each quantised by itself, one after another. The scales are one run of bytes:

    plain          absmax fp32 [E blocks]
    double quant   nested absmax fp32 [E nested] | offset fp32 [E] | absmax u8 [E blocks]

with nested = ceil(blocks / 256).

Shapes: N flat elements, B blocks of all matrices, E matrices, O out_features, I in_features.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import bitsandbytes.functional as bnb
import torch
from torch import Tensor

BLOCK = 64
NESTED_BLOCK = 256

CHUNK = 2**17
"""Weights quantised at a time on a CPU, where bitsandbytes takes ten times their bytes of scratch.
A multiple of every block size."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """Where the bytes of one quantised weight lie."""

    shape: tuple[int, int]
    """Of one matrix."""
    double_quant: bool
    count: int = 1
    """Matrices (E)."""
    block: int = BLOCK
    nested_block: int = NESTED_BLOCK
    quant_type: Literal["nf4", "fp4"] = "nf4"

    @property
    def matrix_numel(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def numel(self) -> int:
        return self.count * self.matrix_numel

    @property
    def matrix_blocks(self) -> int:
        return -(-self.matrix_numel // self.block)

    @property
    def num_blocks(self) -> int:
        return self.count * self.matrix_blocks

    @property
    def matrix_bytes(self) -> int:
        """Half a byte a weight; an odd last weight fills its byte alone."""
        return -(-self.matrix_numel // 2)

    @property
    def packed_bytes(self) -> int:
        return self.count * self.matrix_bytes

    @property
    def matrix_nested(self) -> int:
        return -(-self.matrix_blocks // self.nested_block)

    @property
    def num_nested(self) -> int:
        return self.count * self.matrix_nested

    @property
    def scale_bytes(self) -> int:
        if self.double_quant:
            return 4 * self.num_nested + 4 * self.count + self.num_blocks
        return 4 * self.num_blocks

    def weights_of_bytes(self, start: int, stop: int) -> tuple[int, int]:
        """Flat range of whole blocks that packed bytes [start, stop) need."""
        if start >= stop:
            return self.numel, self.numel
        first, byte = divmod(start, self.matrix_bytes)
        last, last_byte = divmod(stop - 1, self.matrix_bytes)
        begin = 2 * byte // self.block * self.block
        end = min(-(-2 * (last_byte + 1) // self.block) * self.block, self.matrix_numel)
        return first * self.matrix_numel + begin, last * self.matrix_numel + end

    def blocks_of_bytes(self, start: int, stop: int) -> tuple[int, int]:
        """Blocks whose first weight lies in packed bytes [start, stop): each has one owner."""
        return self._block_from(start), self._block_from(stop)

    def place_of(self, weight: int) -> tuple[int, int]:
        """(packed byte, block) in which a flat weight lies."""
        matrix, weight = divmod(weight, self.matrix_numel)
        return (
            matrix * self.matrix_bytes + weight // 2,
            matrix * self.matrix_blocks + weight // self.block,
        )

    def _block_from(self, byte: int) -> int:
        """The first block that begins at or after a packed byte."""
        matrix, byte = divmod(byte, self.matrix_bytes)
        return matrix * self.matrix_blocks + min(-(-2 * byte // self.block), self.matrix_blocks)


def quantize(w_N: Tensor, layout: Layout, start: int = 0) -> tuple[Tensor, Tensor]:
    """(packed uint8, absmax fp32 of its blocks) of the weights from ``start`` on, where a block
    begins; they end where one ends."""
    (byte, block), (end, last) = layout.place_of(start), layout.place_of(start + w_N.numel())
    packed = w_N.new_empty(end - byte, dtype=torch.uint8)
    absmax = w_N.new_empty(last - block, dtype=torch.float32)
    rest, rest_of_absmax = packed, absmax
    for part in _within_matrices(w_N, layout, start):
        own, own_absmax = _quantize(part, layout)
        rest[: own.numel()], rest_of_absmax[: own_absmax.numel()] = own, own_absmax
        rest, rest_of_absmax = rest[own.numel() :], rest_of_absmax[own_absmax.numel() :]
    return packed, absmax


def _within_matrices(w_N: Tensor, layout: Layout, start: int) -> Iterator[Tensor]:
    """The range cut at the ends of matrices, and so that scratch stays small."""
    while w_N.numel():
        rest = layout.matrix_numel - start % layout.matrix_numel
        size = min(w_N.numel(), rest, CHUNK if w_N.device.type == "cpu" else rest)
        yield w_N[:size]
        w_N, start = w_N[size:], start + size


def _quantize(w_N: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """Of whole blocks of one matrix."""
    packed, state = bnb.quantize_4bit(
        w_N, blocksize=layout.block, quant_type=layout.quant_type, compress_statistics=False
    )
    return packed.flatten(), state.absmax


def offsets(absmax_B: Tensor, layout: Layout) -> Tensor:
    """What double quantisation subtracts from the scales of each matrix, fp32 [E]: their mean.

    One rank takes it for all: a sum of partial means differs by an ulp, which changes every nested
    scale.
    """
    return torch.stack([absmax.mean() for absmax in absmax_B.split(layout.matrix_blocks)])


def scale_bytes(absmax_B: Tensor, offset_E: Tensor, layout: Layout) -> Tensor:
    """The scales of a whole tensor as bytes, uint8 [layout.scale_bytes]."""
    if not layout.double_quant:
        return absmax_B.contiguous().view(torch.uint8)
    quantized, nested = [], []
    for absmax, offset in zip(absmax_B.split(layout.matrix_blocks), offset_E, strict=True):
        codes, state = bnb.quantize_blockwise(absmax - offset, blocksize=layout.nested_block)
        quantized.append(codes)
        nested.append(state.absmax.view(torch.uint8))
    return torch.cat([*nested, offset_E.contiguous().view(torch.uint8), *quantized])


def absmax_of(scales: Tensor, layout: Layout, matrix: int = 0) -> Tensor:
    """absmax fp32 [B] of one matrix, back from the bytes of ``scale_bytes``."""
    blocks, nested = layout.matrix_blocks, layout.matrix_nested

    # The clones are small, and aligned: ZeRO-3 may gather these bytes to an odd place inside a
    # larger buffer.
    def floats(start: int, count: int) -> Tensor:
        return scales[4 * start : 4 * (start + count)].clone().view(torch.float32)

    if not layout.double_quant:
        return floats(matrix * blocks, blocks)
    state = bnb.QuantState(
        absmax=floats(matrix * nested, nested),
        code=dynamic_map(scales.device),
        blocksize=layout.nested_block,
        dtype=torch.float32,
    )
    codes_start = 4 * (layout.num_nested + layout.count) + matrix * blocks
    quantized_B = scales[codes_start : codes_start + blocks]
    return bnb.dequantize_blockwise(quantized_B, state) + floats(layout.num_nested + matrix, 1)


def dynamic_map(device: torch.device) -> Tensor:
    """bitsandbytes' signed 8-bit code, kept by it after the first use."""
    if "dynamic" not in bnb.name2qmap:
        bnb.name2qmap["dynamic"] = bnb.create_dynamic_map()
    if bnb.name2qmap["dynamic"].device != device:
        bnb.name2qmap["dynamic"] = bnb.name2qmap["dynamic"].to(device)
    code: Tensor = bnb.name2qmap["dynamic"]
    return code


def dequantize(
    packed: Tensor, scales: Tensor, layout: Layout, dtype: torch.dtype, matrix: int = 0
) -> Tensor:
    """w_OI of one matrix in ``dtype`` from the whole tensor's bytes (each uint8, tail padding
    allowed)."""
    state = bnb.QuantState(
        absmax=absmax_of(scales, layout, matrix),
        shape=torch.Size(layout.shape),
        blocksize=layout.block,
        quant_type=layout.quant_type,
        dtype=dtype,
    )
    own = packed.narrow(0, matrix * layout.matrix_bytes, layout.matrix_bytes)
    w_OI: Tensor = bnb.dequantize_4bit(own.view(-1, 1), state)
    return w_OI
