"""Sums and exact top-k over sharded scores: the bits of one process, on any number of ranks.

A shard is elements [start, start + len) of a flattened matrix R x C. A segment is what is summed or
ranked together: a row, a column, or the whole. ``segment_sum`` and ``top_k`` are collectives.

Two things make the bits independent of the cut. Sums are taken over integers: every value is
scaled to the same power of two, so that additions commute exactly. Ranks are found by radix select
over all-reduced counts: 4 passes of 256 bins find the k-th largest of every segment, and ties at it
go to the lowest index.

Traffic of a rank, an all-reduce counted twice: ``segment_sum`` 16 bytes a segment; ``top_k`` 8 KiB
a segment, and 8 bytes a segment and rank for the ties. Gathering the scores would cost 4 bytes an
element: as much at 2,000 to 4,000 entries a segment, more above, and every rank would hold them.
"""

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from sparse_lora_dist import comm
from sparse_lora_dist.methods.base import By

BINS = 256
SHIFTS = (24, 16, 8, 0)
"""A float's 32 bits are looked at in four bytes, the highest first."""

SUM_BITS = 40
"""Bits of a value, counted from the largest of all, that enter a sum (a float has 24). Of 64, 23
remain for the number of values: in segments of more than 8 million, fewer bits enter."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardScore:
    """Importance of one tensor, of which this rank holds a part: ``methods.base.Score``."""

    shard: Tensor
    start: int
    """Where the shard begins in the flattened tensor."""
    shape: tuple[int, ...]

    @property
    def matrix(self) -> tuple[int, int]:
        """Rows and columns; a vector's entries are rows of one."""
        return self.shape[0], prod(self.shape[1:])

    def top_k(self, k: int, by: By) -> Tensor:
        """Shard of the mask of the ``k`` largest of every segment. Collective."""
        return top_k(self.shard, self.start, self.matrix, by, k)

    def sums(self, by: By) -> Tensor:
        """Sum of every segment, whole on every rank. Collective."""
        return segment_sum(self.shard, self.start, self.matrix, by)

    def spread(self, values: Tensor, by: By) -> Tensor:
        """Shard of the tensor in which every entry has its segment's value."""
        return values[segments_of(self.start, len(self.shard), self.matrix, by, values.device)]


def segments_of(
    start: int, length: int, shape: tuple[int, int], by: By, device: torch.device | None = None
) -> Tensor:
    """The segment of each element of a shard, int64 [length]."""
    index = torch.arange(start, start + length, device=device)
    if by == "row":
        return index // shape[1]
    return index % shape[1] if by == "column" else torch.zeros_like(index)


def num_segments(shape: tuple[int, int], by: By) -> int:
    """How many there are."""
    return {"row": shape[0], "column": shape[1], "tensor": 1}[by]


def segment_sum(shard: Tensor, start: int, shape: tuple[int, int], by: By) -> Tensor:
    """Sum of every segment, float64 [segments], the same bits on every rank and for every cut.

    s_j = 2^(e - 40) * sum_i round(x_i * 2^(40 - e)), with 2^e the power of two above the largest
    |x|: for each value summed, an error of at most 2^-40 of the largest.
    """
    _refuse_nan(shard)
    count = num_segments(shape, by)
    bits = min(SUM_BITS, 63 - (shape[0] * shape[1] // count).bit_length())
    largest = shard.abs().amax() if shard.numel() else shard.new_zeros(())
    exponent = torch.frexp(comm.max_over_ranks(largest.double())).exponent
    scaled = torch.ldexp(shard.double(), bits - exponent).round().long()
    segments = segments_of(start, len(shard), shape, by, shard.device)
    sums = torch.zeros(count, dtype=torch.int64, device=shard.device)
    sums.index_add_(0, segments, scaled)
    return torch.ldexp(comm.sum_over_ranks(sums).double(), exponent - bits)


def top_k(shard: Tensor, start: int, shape: tuple[int, int], by: By, k: int) -> Tensor:
    """True for this shard's entries among the ``k`` largest of their segment, bool [length].

    Exactly k of every segment are chosen over all ranks; among equal values those of lowest index.
    """
    _refuse_nan(shard)
    segments = segments_of(start, len(shard), shape, by, shard.device)
    count = num_segments(shape, by)
    size = shape[0] * shape[1] // count
    if not 1 <= k <= size:
        raise ValueError(f"k must be in [1, {size}], got {k}")
    keys = _ordered(shard)
    prefix = torch.zeros(count, dtype=torch.int64, device=shard.device)
    left = torch.full((count,), k, dtype=torch.int64, device=shard.device)
    for shift in SHIFTS:
        # Among the entries whose higher bytes are the threshold's: which byte is it at here?
        same = (keys >> shift >> 8) == prefix[segments]
        bins = _histogram(segments[same], keys[same] >> shift & (BINS - 1), count)
        above = bins.flip(1).cumsum(1).flip(1) - bins  # entries in higher bins
        byte = (above < left[:, None]).long().argmax(1)
        left -= above.gather(1, byte[:, None])[:, 0]
        prefix = prefix << 8 | byte
    threshold = prefix[segments]
    return (keys > threshold) | _first_ties(keys == threshold, segments, left)


def _histogram(segments: Tensor, byte: Tensor, count: int) -> Tensor:
    """How many entries of all ranks lie in each bin, int64 [segments, 256]."""
    own = torch.bincount(segments * BINS + byte, minlength=count * BINS).view(count, BINS)
    return comm.sum_over_ranks(own.int()).long()


def _first_ties(tied: Tensor, segments: Tensor, left: Tensor) -> Tensor:
    """Of the tied entries, the first ``left`` of each segment: ranks hold indices in rank order."""
    own = torch.bincount(segments[tied], minlength=len(left))
    everyone = comm.all_gather_flat(own, len(left) * comm.world_size()).view(-1, len(left))
    before = everyone[: comm.rank()].sum(0)
    order = torch.argsort(segments[tied], stable=True)
    sorted_segments = segments[tied][order]
    first = own.cumsum(0) - own
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device) - first[sorted_segments]
    chosen = tied.clone()
    chosen[tied] = place + before[segments[tied]] < left[segments[tied]]
    return chosen


def _ordered(shard: Tensor) -> Tensor:
    """int64 keys in [0, 2^32) that order as the fp32 values do; -0 is 0."""
    bits = (shard.float() + 0.0).view(torch.int32).long() & 0xFFFFFFFF
    return torch.where(bits >> 31 == 1, 0xFFFFFFFF - bits, bits | 0x80000000)


def _refuse_nan(shard: Tensor) -> None:
    bad = comm.max_over_ranks((~torch.isfinite(shard)).any().int())
    if bad:
        raise FloatingPointError("importance scores hold NaN or infinity")
