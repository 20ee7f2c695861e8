"""How ZeRO-3 cuts a tensor into shares, and what a rank has of one."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_lora_dist.distributed import comm

Values = Callable[[int, int], Tensor]
"""(start, stop) -> those elements of a flattened tensor, 1-D: the ones this rank is to own."""


def share_of(numel: int) -> int:
    """How ZeRO-3 cuts: equal shares, rounded up."""
    return -(-numel // comm.world_size())


def own_range(numel: int) -> tuple[int, int]:
    """This rank's share of a flattened tensor, without the padding that makes shares equal."""
    share = share_of(numel)
    start = min(share * comm.rank(), numel)
    return start, min(start + share, numel)


def as_share(own: Tensor, share: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """``own`` padded to a whole share. Kept as it is where it fits: a large share is not copied."""
    lonely = own.untyped_storage().nbytes() == own.nbytes  # a view would keep what it is a part of
    if (own.numel(), own.dtype, own.device) == (share, dtype, device) and lonely:
        return own
    padded = torch.zeros(share, dtype=dtype, device=device)
    padded[: own.numel()] = own
    return padded


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorSlice:
    """This rank's part of one trained tensor: elements [start, start + length) of it, flattened."""

    name: str
    shape: tuple[int, ...]
    start: int
    length: int
    """Without the padding that makes shares equal; 0 where a small tensor left nothing."""
    flat: int
    """Which of the engine's flat fp32 tensors it lies in."""
    offset: int
    """Where in that flat tensor it begins."""
    share: int
    """Elements reserved for it there, the same on every rank."""

    @property
    def numel(self) -> int:
        return math.prod(self.shape)
