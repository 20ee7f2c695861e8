"""One rank's part in quantising one linear weight, and the two sharded parameters that come out.

ZeRO-3 cuts the packed bytes into equal shares, wherever that falls. A rank reads and quantises the
blocks that enclose its share, and answers for the scales of those blocks whose first weight it
owns; the scales of all ranks are gathered (1/16 byte a weight) and cut again, since ZeRO-3 shards
them by themselves.

Shapes: B blocks of the whole tensor.
"""

import torch
from torch import Tensor, nn

from sparse_lora_dist.base_model import nf4
from sparse_lora_dist.distributed import comm
from sparse_lora_dist.zero3.parameters import ShardBuilder
from sparse_lora_dist.zero3.shares import own_range, share_of

QuantLinearParameters = tuple[nn.Parameter, nn.Parameter]


def own_bytes(num_bytes: int, dtype: torch.dtype) -> tuple[int, int]:
    """This rank's range of so many bytes in the clothing of ``dtype``."""
    start, stop = own_range(num_elements_for(num_bytes, dtype))
    return min(start * dtype.itemsize, num_bytes), min(stop * dtype.itemsize, num_bytes)


def own_weights(layout: nf4.Layout, dtype: torch.dtype) -> tuple[int, int]:
    """The flat range of weights that this rank's share is made from: at most two blocks more."""
    return layout.weights_of_bytes(*own_bytes(layout.packed_bytes, dtype))


def quantized_parameters(
    w_N: Tensor, layout: nf4.Layout, builder: ShardBuilder
) -> QuantLinearParameters:
    """(packed, scales) of one weight, each sharded, bytes in the clothing of the builder's dtype.
    Collective.

    Args:
        w_N: the weights of ``own_weights``, on the builder's device.
    """
    dtype = builder.dtype
    own_packed, own_absmax = quantized_part(w_N, layout, dtype)
    packed = bytes_parameter(own_packed, layout.packed_bytes, builder)
    absmax_B = _gather_absmax(own_absmax, layout, dtype)
    # One rank takes the means for all, over whole vectors, as bitsandbytes does.
    offset_E = comm.broadcast(nf4.offsets(absmax_B, layout))
    scales = nf4.scale_bytes(absmax_B, offset_E, layout)
    first, last = own_bytes(layout.scale_bytes, dtype)
    return packed, bytes_parameter(scales[first:last], layout.scale_bytes, builder)


def quantized_part(w_N: Tensor, layout: nf4.Layout, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(this rank's share of the packed bytes, absmax fp32 of the blocks it answers for)."""
    first, last = own_bytes(layout.packed_bytes, dtype)
    w_start, _ = layout.weights_of_bytes(first, last)
    packed, absmax = nf4.quantize(w_N, layout, w_start)
    # Of the first block another rank may own the first weight, and with it the scale.
    packed_start, block_start = layout.place_of(w_start)
    own = packed[first - packed_start : last - packed_start]
    return own, absmax[layout.blocks_of_bytes(first, last)[0] - block_start :]


def bytes_parameter(own: Tensor, num_bytes: int, builder: ShardBuilder) -> nn.Parameter:
    """A sharded parameter of ``num_bytes`` bytes, of which ``own`` are this rank's."""
    clothes = as_parameter_dtype(own, builder.dtype)
    return builder.parameter(
        (num_elements_for(num_bytes, builder.dtype),), lambda start, stop: clothes
    )


def num_elements_for(num_bytes: int, dtype: torch.dtype) -> int:
    """How many elements of ``dtype`` hold that many bytes."""
    return -(-num_bytes // dtype.itemsize)


def as_parameter_dtype(raw: Tensor, dtype: torch.dtype) -> Tensor:
    """uint8 bytes seen as ``dtype``, zero-padded to whole elements. Bit for bit: these are not
    numbers."""
    length = num_elements_for(raw.numel(), dtype) * dtype.itemsize
    # A view of other bytes may begin where no element can.
    fits = raw.numel() == length and raw.storage_offset() == 0
    return (raw if fits else _padded(raw, length)).view(dtype)


def _gather_absmax(own: Tensor, layout: nf4.Layout, dtype: torch.dtype) -> Tensor:
    """absmax fp32 [B] of the whole tensor. Collective."""
    share = share_of(num_elements_for(layout.packed_bytes, dtype)) * dtype.itemsize
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
