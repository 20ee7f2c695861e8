"""Quantise one rank's shard of a tensor, and create sharded parameters for its bytes and scales.

ZeRO-3 cuts the packed bytes into equal shards, also inside a block. A rank reads and quantises the
blocks that cover its shard, and provides the scales of the blocks whose first weight it holds
(example in ``nf4.py``). The scales, 1/16 byte for each weight, are gathered on all ranks and cut
again, since ZeRO-3 shards them as a parameter of their own.

Both parameters hold raw bytes, but have the same dtype as all other parameters (bf16), since
DeepSpeed handles one dtype for all parameters. Their values as bf16 numbers mean nothing.

Letters in shapes and at the end of names: N weights of a range, B blocks of the whole tensor, E
matrices of the whole tensor.
"""

import torch
from torch import Tensor, nn

from sparse_lora_dist.base_model import nf4
from sparse_lora_dist.distributed import comm
from sparse_lora_dist.zero3.parameters import ShardBuilder
from sparse_lora_dist.zero3.slices import own_range, shard_of

QuantLinearParameters = tuple[nn.Parameter, nn.Parameter]
"""(packed bytes, scales) of one tensor of weights, both sharded."""


def own_bytes(num_bytes: int, dtype: torch.dtype) -> tuple[int, int]:
    """Return (start, stop), in bytes, of this rank's shard of a parameter that holds raw bytes.

    Args:
        num_bytes: number of bytes that the whole parameter holds.
        dtype: dtype of the parameter.
    """
    start, stop = own_range(num_elements_for(num_bytes, dtype))
    return min(start * dtype.itemsize, num_bytes), min(stop * dtype.itemsize, num_bytes)


def own_weights(layout: nf4.Layout, dtype: torch.dtype) -> tuple[int, int]:
    """Return (start, stop) of the weights that this rank must quantise to get its packed shard.

    The range consists of whole blocks, at most two more than the shard itself has.

    Args:
        layout: layout of the whole tensor.
        dtype: dtype of the sharded parameter.
    """
    return layout.weights_of_bytes(*own_bytes(layout.packed_bytes, dtype))


def quantized_parameters(
    w_N: Tensor, layout: nf4.Layout, builder: ShardBuilder
) -> QuantLinearParameters:
    """Quantise a tensor of weights and create its two sharded parameters. Collective.

    Args:
        w_N: 1-D tensor of float weights on the builder's device, those in the range that
            ``own_weights`` returns.
        layout: layout of the whole tensor.
        builder: object that creates the sharded parameters.

    Returns:
        Tuple of packed bytes and scales. Each is a frozen sharded 1-D parameter in the builder's
        dtype that holds raw bytes.
    """
    dtype = builder.dtype
    own_packed, own_absmax = quantized_part(w_N, layout, dtype)
    packed = bytes_parameter(own_packed, layout.packed_bytes, builder)
    absmax_B = _gather_absmax(own_absmax, layout, dtype)
    # From one rank, over whole vectors as in bitsandbytes: see nf4.offsets.
    offset_E = comm.broadcast(nf4.offsets(absmax_B, layout))
    scales = nf4.scale_bytes(absmax_B, offset_E, layout)
    first, last = own_bytes(layout.scale_bytes, dtype)
    return packed, bytes_parameter(scales[first:last], layout.scale_bytes, builder)


def quantized_part(w_N: Tensor, layout: nf4.Layout, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Quantise this rank's range of a tensor of weights. Not collective.

    Args:
        w_N: 1-D tensor of float weights, those in the range that ``own_weights`` returns.
        layout: layout of the whole tensor.
        dtype: dtype of the sharded parameter.

    Returns:
        Tuple of this rank's shard of the packed bytes (uint8, 1-D, without padding) and the absmax
        of the blocks whose first weight lies in that shard (fp32, 1-D).
    """
    first, last = own_bytes(layout.packed_bytes, dtype)
    w_start, _ = layout.weights_of_bytes(first, last)
    packed, absmax = nf4.quantize(w_N, layout, w_start)
    # The first block may begin in another rank's shard; its scale then comes from that rank.
    packed_start, block_start = layout.place_of(w_start)
    own = packed[first - packed_start : last - packed_start]
    return own, absmax[layout.blocks_of_bytes(first, last)[0] - block_start :]


def bytes_parameter(own: Tensor, num_bytes: int, builder: ShardBuilder) -> nn.Parameter:
    """Create a sharded parameter that holds raw bytes, viewed as elements of the builder's dtype.

    All ranks must call it, in the same order.

    Args:
        own: uint8, 1-D, bytes of this rank's shard, those in the range that ``own_bytes`` returns.
        num_bytes: number of bytes that the whole parameter holds.
        builder: creates the parameter; its dtype, such as bf16, is the parameter's.

    Returns:
        Frozen sharded 1-D parameter. If ``num_bytes`` is no multiple of the element size, its last
        element is filled up with zero bytes.
    """
    elements = as_parameter_dtype(own, builder.dtype)
    return builder.parameter(
        (num_elements_for(num_bytes, builder.dtype),), lambda start, stop: elements
    )


def num_elements_for(num_bytes: int, dtype: torch.dtype) -> int:
    """Return the number of elements of ``dtype`` that hold ``num_bytes`` bytes, rounded up."""
    return -(-num_bytes // dtype.itemsize)


def as_parameter_dtype(raw: Tensor, dtype: torch.dtype) -> Tensor:
    """Reinterpret raw bytes as elements of ``dtype``, without conversion.

    Args:
        raw: uint8, 1-D. If its length is not a multiple of the element size, a copy is padded with
            zero bytes.
        dtype: dtype of the parameter that will hold the bytes.

    Returns:
        1-D tensor of ``dtype``: a view of ``raw`` where possible.
    """
    length = num_elements_for(raw.numel(), dtype) * dtype.itemsize
    # A view may begin at an address that is not aligned for dtype.
    fits = raw.numel() == length and raw.storage_offset() == 0
    return (raw if fits else _padded(raw, length)).view(dtype)


def _gather_absmax(own: Tensor, layout: nf4.Layout, dtype: torch.dtype) -> Tensor:
    """Return the absmax of all blocks of the tensor, fp32 of shape [B]. Collective.

    Args:
        own: fp32, 1-D, absmax of the blocks whose first weight lies in this rank's shard.
        layout: layout of the whole tensor.
        dtype: dtype of the sharded parameter of packed bytes.
    """
    share = shard_of(num_elements_for(layout.packed_bytes, dtype)) * dtype.itemsize
    cuts = [min(share * r, layout.packed_bytes) for r in range(comm.world_size() + 1)]
    owned = [layout.blocks_of_bytes(*cut) for cut in zip(cuts, cuts[1:], strict=False)]
    most = max(stop - start for start, stop in owned)
    everyone = comm.all_gather_flat(_padded(own, most), most * comm.world_size()).view(-1, most)
    rows = zip(everyone, owned, strict=True)
    return torch.cat([row[: stop - start] for row, (start, stop) in rows])


def _padded(t: Tensor, length: int) -> Tensor:
    out = t.new_zeros(length)
    count = min(t.numel(), length)
    out[:count] = t[:count]
    return out
