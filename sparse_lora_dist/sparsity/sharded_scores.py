"""Sums and exact top-k over sharded scores: the bits of one process, on any number of ranks.

A rank holds elements [start, start + length) of every flattened tensor, ranks in order. As a matrix
a tensor has shape[0] rows and prod(shape[1:]) columns. A segment is what is summed or ranked
together: a row, a column, or the whole.

Two things make the bits independent of the cut. Sums are taken over integers: every value of a
tensor is scaled by the same power of two, so that additions commute exactly. Ranks are found by
radix select over all-reduced counts: 4 passes of 256 bins find the k-th largest of every segment,
and ties at it go to the lowest index.

A call has one set of collectives for all the tensors that it names, whatever their number:

    top_k   6 a group of tensors: the largest values, 4 times the counts, the ties (5: all ties)
    sums    2: the largest values, the sums
    live    1

Bytes that a rank receives, an all-reduce counted twice: for the largest values 8 a tensor; for sums
and counts of the living 16 a segment; in ``top_k`` 8 KiB a segment, and for its ties 4 a segment
and other rank. Gathering the scores would cost 4 bytes an element: as much at 2,000 entries a
segment, more above, and every rank would hold them.

``top_k`` needs up to 100 bytes an entry and 6 KiB a segment for itself; groups keep that below
about 400 MiB.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from sparse_lora_dist.distributed import comm
from sparse_lora_dist.methods.protocol.method import By, Ties

BINS = 256
SHIFTS = (24, 16, 8, 0)
"""A float's 32 bits are looked at in four bytes, the highest first."""

SUM_BITS = 40
"""Bits of a value, counted from the largest of all, that enter a sum (a float has 24). Of 64, 23
remain for the number of values: in segments of more than 8 million, fewer bits enter."""

GROUP_ENTRIES = 2**22
"""Entries of a rank that are ranked at once; a tensor with more is a group of its own."""
GROUP_SEGMENTS = 2**15
"""Segments that are ranked at once, likewise."""


"""What to choose of entries that equal the k-th: those of lowest index up to k, or all."""


class TensorSlice(Protocol):
    """This rank's part of a tensor: elements [start, start + length) of it, flattened."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def start(self) -> int: ...
    @property
    def length(self) -> int: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardScores:
    """Importance of tensors of which this rank holds parts: ``methods.base.Scores``.

    All ranks must name the same tensors in a call; in which order does not matter.
    """

    slices: Mapping[str, TensorSlice]
    score: Callable[[str], Tensor]
    """name -> this rank's part of its importance, fp32, 1-D. Computed when asked, for what a call
    names: nothing is held."""
    live_mask: Callable[[str], Tensor]
    """name -> this rank's part of the mask of its live entries, 1-D."""
    site_stats: Tensor

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Of the whole tensors."""
        return {name: tensor_slice.shape for name, tensor_slice in self.slices.items()}

    def top_k(
        self, k: Mapping[str, int], by: Mapping[str, By], ties: Ties = "index"
    ) -> dict[str, Tensor]:
        """This rank's part of the mask of the ``k`` largest of every segment, 1-D. Collective.

        Exactly k of every segment are chosen over all ranks: of what equals the k-th largest, as 0
        equals -0, those of lowest index. With ``ties="all"`` all of these, so k or more.

        Raises:
            ValueError: a segment has fewer entries than k, or k is not positive.
            FloatingPointError: on every rank, if a score of any is NaN or infinite.
        """
        for name in sorted(k):
            size = _segment_size(self.slices[name].shape, by[name])
            if not 1 <= k[name] <= size:
                raise ValueError(f"{name}: k must be in [1, {size}], got {k[name]}")
        masks: dict[str, Tensor] = {}
        for group in self._groups(sorted(k), by):
            masks |= self._top_k_of_group(group, k, by, ties)
        return masks

    def sums(self, by: Mapping[str, By]) -> dict[str, Tensor]:
        """The sum of the scores of every segment, float64, whole on every rank. Collective.

        s_j = 2^(e - 40) * sum_i round(x_i * 2^(40 - e)), with 2^e the power of two above the
        tensor's largest |x|: for each value summed, an error of at most 2^-40 of the largest.

        Raises:
            FloatingPointError: on every rank, if a score of any is NaN or infinite.
        """
        names = sorted(by)
        # Scores are asked for twice, so that one tensor's at a time are in memory.
        largest = _largest(names, (self.score(name) for name in names))
        places = {name: self._binary_places(name, by[name], largest[name]) for name in names}
        scaled = (self.score(name).double() * 2.0 ** places[name] for name in names)
        totals = self._add_up(names, by, (x.round().long() for x in scaled))
        return {name: total.double() * 2.0 ** -places[name] for name, total in totals.items()}

    def live(self, by: Mapping[str, By]) -> dict[str, Tensor]:
        """How many entries of every segment live, int64, whole on every rank. Collective."""
        names = sorted(by)
        return self._add_up(names, by, (self.live_mask(name).long() for name in names))

    def spread(self, name: str, values: Tensor, by: By) -> Tensor:
        """This rank's part of the tensor in which every entry has its segment's value, 1-D."""
        device = self.live_mask(name).device  # where the tensor's shard lies; values may not
        return values.to(device)[segments_of(self.slices[name], by, device)]

    def _groups(self, names: Sequence[str], by: Mapping[str, By]) -> Iterator[list[str]]:
        """The names cut into groups within the bounds, the same on every rank."""
        group: list[str] = []
        entries = segments = 0
        for name in names:
            shape = self.slices[name].shape
            share, count = -(-math.prod(shape) // comm.world_size()), num_segments(shape, by[name])
            entries, segments = entries + share, segments + count
            if group and (entries > GROUP_ENTRIES or segments > GROUP_SEGMENTS):
                yield group
                group, entries, segments = [], share, count
            group.append(name)
        if group:
            yield group

    def _top_k_of_group(
        self, group: Sequence[str], k: Mapping[str, int], by: Mapping[str, By], ties: Ties
    ) -> dict[str, Tensor]:
        """Ranked together as one long shard, the segments of all tensors numbered through."""
        shards = [self.score(name) for name in group]
        _largest(group, shards)  # refuses NaN
        segments: list[Tensor] = []
        wanted: list[int] = []
        for name, shard in zip(group, shards, strict=True):
            tensor_slice = self.slices[name]
            segments.append(segments_of(tensor_slice, by[name], shard.device) + len(wanted))
            wanted += [k[name]] * num_segments(tensor_slice.shape, by[name])
        left = torch.tensor(wanted, device=shards[0].device)
        mask = first_k(falling_keys(torch.cat(shards)), torch.cat(segments), left, ties)
        return dict(zip(group, mask.split([len(shard) for shard in shards]), strict=True))

    def _binary_places(self, name: str, by: By, largest: float) -> int:
        """How many places behind the binary point leave room for a segment's sum in 64 bits."""
        size = _segment_size(self.slices[name].shape, by)
        return min(SUM_BITS, 63 - size.bit_length()) - math.frexp(largest)[1]

    def _add_up(
        self, names: Sequence[str], by: Mapping[str, By], shards: Iterable[Tensor]
    ) -> dict[str, Tensor]:
        """The sums of integers in every segment over all ranks, int64."""
        own = []
        for name, shard in zip(names, shards, strict=True):
            tensor_slice = self.slices[name]
            sums = shard.new_zeros(num_segments(tensor_slice.shape, by[name]))
            own.append(sums.index_add_(0, segments_of(tensor_slice, by[name], shard.device), shard))
        if not own:
            return {}
        totals = comm.sum_over_ranks(torch.cat(own)).split([len(sums) for sums in own])
        return dict(zip(names, totals, strict=True))


def segments_of(tensor_slice: TensorSlice, by: By, device: torch.device | None = None) -> Tensor:
    """The segment of each element of a shard, int64 [length]."""
    index = torch.arange(
        tensor_slice.start, tensor_slice.start + tensor_slice.length, device=device
    )
    if by == "tensor":
        return torch.zeros_like(index)
    columns = math.prod(tensor_slice.shape[1:])
    return index // columns if by == "row" else index % columns


def num_segments(shape: tuple[int, ...], by: By) -> int:
    """How many there are."""
    return {"row": shape[0], "column": math.prod(shape[1:]), "tensor": 1}[by]


def _segment_size(shape: tuple[int, ...], by: By) -> int:
    return math.prod(shape) // num_segments(shape, by)


def falling_keys(values: Tensor) -> Tensor:
    """int64 keys in [0, 2^32), the lower the larger the fp32 value; -0 is 0."""
    bits = (values.float() + 0.0).view(torch.int32).long()
    return torch.where(bits < 0, bits & 0xFFFFFFFF, 0x7FFFFFFF - bits)


def first_k(keys: Tensor, segments: Tensor, k: Tensor, ties: Ties) -> Tensor:
    """True for this shard's entries among the ``k[s]`` lowest keys of segment s. Collective."""
    near, segments_near, left = keys, segments, k
    prefix = torch.zeros_like(k)  # the higher bytes of the k-th key of each segment
    for shift in SHIFTS:
        bins = _histogram(segments_near, near >> shift & (BINS - 1), len(k))
        below = bins.cumsum(1, dtype=torch.int32) - bins
        byte = (below < left[:, None]).sum(1) - 1
        left = left - below.gather(1, byte[:, None])[:, 0]
        prefix = prefix << 8 | byte
        # Only entries that share these bytes with the k-th can share the next one.
        same = near >> shift == prefix[segments_near]
        near, segments_near = near[same], segments_near[same]
    last = prefix[segments]
    if ties == "all":
        return keys <= last
    return (keys < last) | _first_ties(keys == last, segments, left)


def _histogram(segments: Tensor, byte: Tensor, count: int) -> Tensor:
    """How many entries of all ranks lie in each bin, int32 [segments, 256]."""
    own = torch.bincount(segments * BINS + byte, minlength=count * BINS).view(count, BINS)
    return comm.sum_over_ranks(own.int())


def _first_ties(tied: Tensor, segments: Tensor, left: Tensor) -> Tensor:
    """Of the tied entries, the first ``left`` of each segment: ranks hold indices in rank order."""
    segments = segments[tied]
    own = torch.bincount(segments, minlength=len(left)).int()
    everyone = comm.all_gather_flat(own, len(left) * comm.world_size()).view(-1, len(left))
    before = everyone[: comm.rank()].sum(0)
    order = torch.argsort(segments, stable=True)
    first = own.cumsum(0) - own
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device) - first[segments[order]]
    chosen = tied.clone()
    chosen[tied] = (place + before[segments]) < left[segments]
    return chosen


def _largest(names: Sequence[str], shards: Iterable[Tensor]) -> dict[str, float]:
    """The largest |x| of every tensor over all ranks; refuses NaN and infinity. Collective."""
    own = [shard.abs().amax() if len(shard) else shard.new_zeros(()) for shard in shards]
    if not own:
        return {}
    # An all-reduced maximum may lose a NaN.
    own_T = torch.stack(own).float().nan_to_num(nan=math.inf, posinf=math.inf)
    largest = dict(zip(names, comm.max_over_ranks(own_T).tolist(), strict=True))
    for name, value in largest.items():
        if math.isinf(value):
            raise FloatingPointError(f"importance scores of {name} hold NaN or infinity")
    return largest
