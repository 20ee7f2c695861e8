"""Compute which elements of a tensor each rank holds under ZeRO-3.

ZeRO-3 flattens a tensor and cuts it into one shard for each rank. All shards have the same length,
rounded up, and the last ones are padded. Example: 10 elements on 4 ranks make shards of 3.

    rank 0  [0, 3)    rank 1  [3, 6)    rank 2  [6, 9)    rank 3  [9, 10) and 2 of padding
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_lora_dist.distributed import comm

Values = Callable[[int, int], Tensor]
"""Function of (start, stop) that returns elements [start, stop) of a flattened tensor, as a 1-D
tensor. Each rank calls it with the range of its own shard."""


def shard_of(numel: int) -> int:
    """Return the number of elements, padding included, in each shard of a tensor.

    Args:
        numel: number of elements of the whole tensor.
    """
    return -(-numel // comm.world_size())


def own_range(numel: int) -> tuple[int, int]:
    """Return (start, stop), the elements of a flattened tensor that this rank holds.

    Padding is not included. The range is empty if a small tensor has no elements for this rank.

    Args:
        numel: number of elements of the whole tensor.
    """
    share = shard_of(numel)
    start = min(share * comm.rank(), numel)
    return start, min(start + share, numel)


def as_shard(own: Tensor, share: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Pad this rank's elements with zeros to a full shard.

    Args:
        own: 1-D tensor of this rank's elements, those of ``own_range``.
        share: number of elements of a shard, from ``shard_of``.
        dtype: dtype of the result.
        device: device of the result.

    Returns:
        1-D tensor of ``share`` elements. It is ``own`` itself if that has the right length, dtype
        and device and its storage holds nothing else, so that a large shard is not copied.
    """
    owns_storage = own.untyped_storage().nbytes() == own.nbytes  # a view keeps its base alive
    if (own.numel(), own.dtype, own.device) == (share, dtype, device) and owns_storage:
        return own
    padded = torch.zeros(share, dtype=dtype, device=device)
    padded[: own.numel()] = own
    return padded


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorSlice:
    """This rank's shard of one trained tensor, and its position in the engine's flat fp32 buffers.

    DeepSpeed keeps the fp32 master values of many trained tensors in one flat buffer
    (``Engine.flats``).
    """

    name: str
    """Name of the parameter in the model."""
    shape: tuple[int, ...]
    """Shape of the whole tensor."""
    start: int
    """Index of the first element that this rank holds, in the flattened tensor."""
    length: int
    """Number of elements that this rank holds, without padding; 0 if a small tensor has none for
    this rank."""
    flat: int
    """Index of the flat fp32 buffer in ``Engine.flats()``."""
    offset: int
    """Index of the slice's first element in that buffer."""
    share: int
    """Number of elements reserved in that buffer, padding included; the same on every rank."""

    @property
    def numel(self) -> int:
        """Number of elements of the whole tensor."""
        return math.prod(self.shape)
