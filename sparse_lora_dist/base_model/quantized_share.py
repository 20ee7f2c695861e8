"""One rank's part in quantising one linear weight, and the two sharded parameters that come out.

ZeRO-3 cuts the packed bytes into equal shares, wherever that falls. A rank reads and quantises the
blocks that enclose its share, and answers for the scales of those blocks whose first weight it
owns; the scales of all ranks are gathered (1/16 byte a weight) and cut again, since ZeRO-3 shards
them by themselves.

Shapes: B blocks of the whole tensor.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from sparse_lora_dist import comm
from sparse_lora_dist.base_model import nf4
from sparse_lora_dist.zero3 import ShardBuilder, share_of

QuantLinearParameters = tuple[nn.Parameter, nn.Parameter]


def quantized_parameters(
    read: Callable[[int, int], Tensor], layout: nf4.Layout, builder: ShardBuilder
) -> QuantLinearParameters:
    """(packed, scales) of one weight, each sharded, bytes in the clothing of the builder's dtype.
    Collective.

    Args:
        read: (start, stop) -> those elements of the flattened weight, on the builder's device.
        Called once, for
            this rank's share and at most two blocks more.
    """
    dtype = builder.dtype
    absmax = torch.empty(0, device=builder.device)

    def own_bytes(start: int, stop: int) -> Tensor:
        nonlocal absmax
        first, last = (min(i * dtype.itemsize, layout.packed_bytes) for i in (start, stop))
        w_start, w_stop = layout.weights_of_bytes(first, last)
        packed, absmax = nf4.quantize(read(w_start, w_stop))
        absmax = absmax[layout.blocks_of_bytes(first, last)[0] - w_start // nf4.BLOCK :]
        return dressed(packed[first - w_start // 2 : last - w_start // 2], dtype)

    packed = builder.parameter((clothes_for(layout.packed_bytes, dtype),), own_bytes)
    share = share_of(clothes_for(layout.packed_bytes, dtype)) * dtype.itemsize
    absmax_B = _gather_absmax(absmax, layout, share)
    # One rank takes the mean for all, over the whole vector, as bitsandbytes does.
    offset = comm.broadcast(absmax_B.mean())
    clothes = dressed(nf4.scale_bytes(absmax_B, offset, layout), dtype)
    scales = builder.parameter(tuple(clothes.shape), lambda start, stop: clothes[start:stop])
    return packed, scales


def clothes_for(num_bytes: int, dtype: torch.dtype) -> int:
    """How many elements of ``dtype`` hold that many bytes."""
    return -(-num_bytes // dtype.itemsize)


def dressed(raw: Tensor, dtype: torch.dtype) -> Tensor:
    """uint8 bytes seen as ``dtype``, zero-padded to whole elements. Bit for bit: these are not
    numbers."""
    return _padded(raw, clothes_for(raw.numel(), dtype) * dtype.itemsize).view(dtype)


def _gather_absmax(own: Tensor, layout: nf4.Layout, share: int) -> Tensor:
    """absmax fp32 [B] of the whole tensor, from ranks with ``share`` bytes each. Collective."""
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
