"""Quantise and dequantise ranges of a 4-bit tensor: which bytes and scales encode which weights.

bitsandbytes does the arithmetic. This file computes positions, so that a rank can quantise any
range of whole blocks and get the bytes that ``bitsandbytes.functional.quantize_4bit`` gives for
the whole matrix (Dettmers et al. 2023, QLoRA, arXiv:2305.14314, section 3).

A weight matrix is flattened and cut into blocks of 64 weights (another size only if the files of
the base model are quantised with it). Each block has one scale, called absmax: its largest absolute
value. Two weights are packed into a byte, the first into the high half. Here a weight is a number,
and a tensor is one weight matrix or the stack of a layer's expert matrices. The matrices of a stack
are quantised separately and stored one after another. All scales of a tensor are stored in one
sequence of bytes. For E matrices, with B blocks and S nested absmax values in all, it is:

    no double quant   absmax fp32 [B]
    double quant      nested absmax fp32 [S] | offset fp32 [E] | absmax codes u8 [B]

Double quantisation quantises the scales too. It subtracts from the scales of a matrix their mean,
the offset, and quantises them to 8-bit codes in blocks of 256 scales. Each of these blocks has one
scale of its own, the nested absmax. So a matrix has ceil(its blocks / 256) nested absmax values,
and absmax = value of the 8-bit code x nested absmax + offset.

Example: a 3 x 50 matrix has 150 weights.

    block            0              1                2
    weights      [0, 64)      [64, 128)      [128, 150)
    packed bytes [0, 32)       [32, 64)        [64, 75)
    scales, double quant: 4 bytes nested absmax, 4 bytes offset, 3 bytes of codes

ZeRO-3 cuts the packed bytes without regard to blocks. If it cuts them at byte 38 for two ranks, the
cut lies inside block 1. Rank 0 quantises weights [0, 128) and keeps bytes [0, 38). Rank 1 quantises
weights [64, 150) and keeps bytes [38, 75). Rank 0 provides the scale of block 1, since it holds the
block's first weight.

Letters in shapes and at the end of names: N weights of a range, B blocks of all matrices, E
matrices, O out_features, I in_features.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import bitsandbytes.functional as bnb
import torch
from torch import Tensor

BLOCK = 64
"""Number of weights that share one scale."""
NESTED_BLOCK = 256
"""Number of scales that share one nested absmax, in double quantisation."""

CHUNK = 2**17
"""Number of weights quantised in one call on a CPU, where bitsandbytes needs scratch memory of ten
times their bytes. It is a multiple of every block size."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """Byte layout of one quantised tensor: one matrix, or a stack of expert matrices.

    The position of a weight is its index in the flattened tensor. In a stack, the flattened
    matrices follow one another.
    """

    shape: tuple[int, int]
    """Shape (O, I) of one matrix."""
    double_quant: bool
    """True if the scales are quantised to 8 bits too."""
    count: int = 1
    """Number of matrices (E): 1, or the number of matrices in a stack of experts."""
    block: int = BLOCK
    """Number of weights that share one scale."""
    nested_block: int = NESTED_BLOCK
    """Number of scales that share one nested absmax, in double quantisation."""
    quant_type: Literal["nf4", "fp4"] = "nf4"
    """4-bit number format, by bitsandbytes' name."""

    @property
    def matrix_numel(self) -> int:
        """Number of weights of one matrix."""
        return self.shape[0] * self.shape[1]

    @property
    def numel(self) -> int:
        """Number of weights of all matrices."""
        return self.count * self.matrix_numel

    @property
    def matrix_blocks(self) -> int:
        """Number of blocks of one matrix. The last one may have fewer weights."""
        return -(-self.matrix_numel // self.block)

    @property
    def num_blocks(self) -> int:
        """Number of blocks of all matrices (B)."""
        return self.count * self.matrix_blocks

    @property
    def matrix_bytes(self) -> int:
        """Number of packed bytes of one matrix: two weights in a byte, rounded up."""
        return -(-self.matrix_numel // 2)

    @property
    def packed_bytes(self) -> int:
        """Number of packed bytes of all matrices."""
        return self.count * self.matrix_bytes

    @property
    def matrix_nested(self) -> int:
        """Number of nested absmax values of one matrix, in double quantisation."""
        return -(-self.matrix_blocks // self.nested_block)

    @property
    def num_nested(self) -> int:
        """Number of nested absmax values of all matrices, in double quantisation."""
        return self.count * self.matrix_nested

    @property
    def scale_bytes(self) -> int:
        """Number of bytes of all scales of the tensor, laid out as in the module docstring."""
        if self.double_quant:
            return 4 * self.num_nested + 4 * self.count + self.num_blocks
        return 4 * self.num_blocks

    def weights_of_bytes(self, start: int, stop: int) -> tuple[int, int]:
        """Return positions (start, stop) of the weights to quantise for a range of packed bytes.

        The range is widened to whole blocks; the last block of a matrix may be short. In the
        example of the module docstring, bytes [38, 75) give weights (64, 150).

        Args:
            start: first packed byte.
            stop: end of the range of packed bytes.
        """
        if start >= stop:
            return self.numel, self.numel
        first, byte = divmod(start, self.matrix_bytes)
        last, last_byte = divmod(stop - 1, self.matrix_bytes)
        begin = 2 * byte // self.block * self.block
        end = min(-(-2 * (last_byte + 1) // self.block) * self.block, self.matrix_numel)
        return first * self.matrix_numel + begin, last * self.matrix_numel + end

    def blocks_of_bytes(self, start: int, stop: int) -> tuple[int, int]:
        """Return (start, stop) of the blocks whose first weight lies in packed bytes [start, stop).

        The rank that holds the bytes provides the scales of these blocks. Over the shards of all
        ranks, each block is counted once. In the example of the module docstring, bytes
        [38, 75) give blocks (2, 3).

        Args:
            start: first packed byte.
            stop: end of the range of packed bytes.
        """
        return self._block_from(start), self._block_from(stop)

    def place_of(self, weight: int) -> tuple[int, int]:
        """Return (index of the packed byte, index of the block) of the weight at a position.

        In the example of the module docstring, weight 76 gives (38, 1).

        Args:
            weight: position of the weight in the flattened tensor.
        """
        matrix, weight = divmod(weight, self.matrix_numel)
        return (
            matrix * self.matrix_bytes + weight // 2,
            matrix * self.matrix_blocks + weight // self.block,
        )

    def _block_from(self, byte: int) -> int:
        """Return the index of the first block that begins at or after a packed byte."""
        matrix, byte = divmod(byte, self.matrix_bytes)
        return matrix * self.matrix_blocks + min(-(-2 * byte // self.block), self.matrix_blocks)


def quantize(w_N: Tensor, layout: Layout, start: int = 0) -> tuple[Tensor, Tensor]:
    """Quantise a range of the weights of a tensor.

    Args:
        w_N: 1-D tensor of float weights. The range must start and end at block boundaries.
        layout: layout of the whole tensor.
        start: position in the whole tensor of the first weight of ``w_N``.

    Returns:
        Tuple of the packed bytes (uint8, 1-D) and the absmax of each block (fp32, 1-D).
    """
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
    """Yield the parts of ``w_N`` that are quantised in one call each.

    ``w_N`` is cut at the ends of matrices, and on a CPU also after every ``CHUNK`` weights. The
    arguments are those of ``quantize``, and the parts are views of ``w_N``.
    """
    while w_N.numel():
        rest = layout.matrix_numel - start % layout.matrix_numel
        size = min(w_N.numel(), rest, CHUNK if w_N.device.type == "cpu" else rest)
        yield w_N[:size]
        w_N, start = w_N[size:], start + size


def _quantize(w_N: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """Return (packed bytes, absmax of each block) of a range of whole blocks inside one matrix."""
    packed, state = bnb.quantize_4bit(
        w_N, blocksize=layout.block, quant_type=layout.quant_type, compress_statistics=False
    )
    return packed.flatten(), state.absmax


def offsets(absmax_B: Tensor, layout: Layout) -> Tensor:
    """Return the mean scale of each matrix, which double quantisation subtracts from the scales.

    One rank must compute it from all scales and broadcast it. If several ranks computed it from
    partial sums, the mean would differ in the last bit, which changes every nested absmax.

    Args:
        absmax_B: fp32 scales of all blocks of the tensor.
        layout: layout of the tensor.

    Returns:
        fp32 tensor of shape [E], one offset for each matrix.
    """
    return torch.stack([absmax.mean() for absmax in absmax_B.split(layout.matrix_blocks)])


def scale_bytes(absmax_B: Tensor, offset_E: Tensor, layout: Layout) -> Tensor:
    """Encode the scales of a whole tensor as bytes.

    Args:
        absmax_B: fp32 scales of all blocks.
        offset_E: fp32 offsets from ``offsets``. They are ignored without double quantisation.
        layout: layout of the tensor.

    Returns:
        uint8 tensor of ``layout.scale_bytes`` bytes, laid out as in the module docstring.
    """
    if not layout.double_quant:
        return absmax_B.contiguous().view(torch.uint8)
    quantized, nested = [], []
    for absmax, offset in zip(absmax_B.split(layout.matrix_blocks), offset_E, strict=True):
        codes, state = bnb.quantize_blockwise(absmax - offset, blocksize=layout.nested_block)
        quantized.append(codes)
        nested.append(state.absmax.view(torch.uint8))
    return torch.cat([*nested, offset_E.contiguous().view(torch.uint8), *quantized])


@dataclass(frozen=True, slots=True)
class Parts:
    """Views of one matrix's bytes, as the ops of bitsandbytes take them."""

    packed: Tensor
    """Packed bytes, uint8 [bytes, 1]."""
    absmax: Tensor
    """fp32 scales of the blocks, or the nested ones if they are quantised too."""
    codes_B: Tensor | None
    """8-bit codes of the scales, uint8; None without double quantisation."""
    offset: Tensor | None
    """fp32 [1], what is added to the scales; None without double quantisation."""


def parts_of(packed: Tensor, scales: Tensor, layout: Layout, matrix: int = 0) -> Parts:
    """Cut the bytes of a tensor into the parts that encode one matrix.

    Args:
        packed: uint8, packed bytes of the whole tensor. Padding at the end is allowed.
        scales: uint8, bytes of the scales of the whole tensor. Padding at the end is allowed.
        layout: layout of the tensor.
        matrix: index of the matrix in the stack.
    """
    blocks, nested = layout.matrix_blocks, layout.matrix_nested
    size = layout.matrix_bytes
    own = packed.narrow(0, matrix * size, size).view(-1, 1)

    def floats(start: int, count: int) -> Tensor:
        raw = scales.narrow(0, 4 * start, 4 * count)
        # ZeRO-3 may gather the bytes to an address where they cannot be viewed as floats.
        return (raw if raw.storage_offset() % 4 == 0 else raw.clone()).view(torch.float32)

    if not layout.double_quant:
        return Parts(own, floats(matrix * blocks, blocks), None, None)
    first = 4 * (layout.num_nested + layout.count) + matrix * blocks
    return Parts(
        packed=own,
        absmax=floats(matrix * nested, nested),
        codes_B=scales.narrow(0, first, blocks),
        offset=floats(layout.num_nested + matrix, 1),
    )


def dynamic_map(device: torch.device) -> Tensor:
    """Return bitsandbytes' signed 8-bit code table, an fp32 tensor of shape [256] on ``device``.

    The table gives the value of each 8-bit code of a scale. The tensor is shared with bitsandbytes,
    which caches it.
    """
    if "dynamic" not in bnb.name2qmap:
        bnb.name2qmap["dynamic"] = bnb.create_dynamic_map()
    if bnb.name2qmap["dynamic"].device != device:
        bnb.name2qmap["dynamic"] = bnb.name2qmap["dynamic"].to(device)
    code: Tensor = bnb.name2qmap["dynamic"]
    return code


def dequantize(parts: Parts, layout: Layout, dtype: torch.dtype) -> Tensor:
    """Dequantise one matrix of a tensor.

    Args:
        parts: bytes of the matrix, from ``parts_of``.
        layout: layout of the tensor.
        dtype: dtype of the result.

    Returns:
        The matrix, of shape ``layout.shape`` and dtype ``dtype``.
    """
    # The ops themselves: bitsandbytes' functions would make an object of each tensor, and check it.
    ops, absmax = torch.ops.bitsandbytes, parts.absmax
    if parts.codes_B is not None:
        code, fp32 = dynamic_map(absmax.device), torch.float32
        absmax = ops.dequantize_blockwise.default(
            parts.codes_B, absmax, code, layout.nested_block, fp32
        ).add_(parts.offset)
    # As one row: bitsandbytes 0.50.2 takes wrong scales on a CPU if a block ends inside a row.
    is_flat = layout.shape[1] % layout.block != 0
    shape = (layout.matrix_numel,) if is_flat else layout.shape
    w_OI: Tensor = ops.dequantize_4bit.default(
        parts.packed, absmax, layout.block, layout.quant_type, shape, dtype
    )
    return w_OI.view(layout.shape)
