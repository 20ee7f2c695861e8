"""Compute sums and exact top-k of sharded scores, with the same bits on any number of ranks.

Sparse methods give each entry of a trained tensor an importance score, and keep the entries with
the largest. A rank holds elements [start, start + length) of every flattened tensor; ranks hold
them in order. As a matrix, a tensor has shape[0] rows and prod(shape[1:]) columns. A segment is a
set of entries that are summed or ranked together: a row, a column, or the whole tensor.

Two things make the result independent of the number of ranks. Sums are sums of integers: every
value of a tensor is scaled by the same power of two and rounded, and integer addition is exact in
any order. The k largest are found by radix select over all-reduced histograms, and of equal scores
those of lowest index win.

Radix select, for the k = 3 largest of a segment that lies on two ranks:

    scores                rank 0: 5.0  1.0  7.0       rank 1: 5.0  0.5  5.0
    index                         0    1    2                 3    4    5

A score's 32 bits are mapped to a key that is lower the larger the score is (``falling_keys``), and
keys are compared by their four bytes, the highest first. Each pass finds one more byte of the k-th
lowest key; the bytes found so far are the prefix. In a pass every rank takes its keys that begin
with the prefix and counts them by their next byte, and an all-reduce adds up the 256 counts. The
next byte of the k-th lowest key is the bin at which the cumulated count reaches k:

    bytes of the keys     7.0: 3F 1F FF FF    5.0: 3F 5F FF FF    1.0: 40 7F FF FF    0.5: 40 FF ..
    pass 1, 3 to find     3F: 4 keys, 40: 2 keys     -> prefix 3F, no key is lower, 3 left
    pass 2, 3 to find     1F: 1 key,  5F: 3 keys     -> prefix 3F5F, one key is lower, 2 left
    passes 3 and 4        FF: 3 keys                 -> the k-th key is 3F5FFFFF (5.0), 2 left

All entries with a lower key are chosen (7.0), and of the three that tie at 5.0 the first 2 by
index. For that, ranks exchange their number of ties: rank 0 has one (index 0), so rank 1 takes one
(index 3).

A call uses one set of collectives for all the tensors it names:

    top_k   6 per group of tensors: largest values, 4 histograms, ties (5 with ties="all")
    sums    2: largest values, sums
    live    1

Bytes that a rank receives, where an all-reduce counts as two times its size:

    largest values   8 per tensor
    sums and live    16 per segment
    top_k            8 KiB per segment for the histograms; for the ties 4 x (number of ranks - 1)
                     per segment

Gathering the scores instead would cost 4 bytes per entry, more than ``top_k`` for segments of more
than 2,000 entries, and every rank would have to hold all scores.

``top_k`` needs up to 100 bytes of memory per entry and 6 KiB per segment; groups keep that below
about 400 MiB.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from sparse_lora_dist.distributed import comm
from sparse_lora_dist.distributed.device import moved
from sparse_lora_dist.methods.protocol.method import By, Ties

BINS = 256
"""Number of values of a byte, and so of bins in a histogram."""
SHIFTS = (24, 16, 8, 0)
"""Position of the lowest bit of each byte of a 32-bit key, in the order in which radix select
reads the bytes."""

SUM_BITS = 40
"""Number of bits to which a value is rounded before it is summed, counted down from the highest bit
of the tensor's largest value (an fp32 value has 24). An int64 sum then has room for 2^23 values; in
segments with more values, fewer bits are kept."""

GROUP_ENTRIES = 2**22
"""Maximum number of entries on one rank that ``top_k`` handles with one set of collectives. A
tensor with more is handled alone."""
GROUP_SEGMENTS = 2**15
"""Maximum number of segments (rows, columns or whole tensors) that ``top_k`` handles with one set
of collectives. A tensor with more is handled alone."""


class SliceOfTensor(Protocol):
    """This rank's part of a tensor: elements [start, start + length) of the flattened tensor.

    ``shape`` is the shape of the whole tensor.
    """

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def start(self) -> int: ...
    @property
    def length(self) -> int: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardScores:
    """Importance scores of sharded tensors, of which a method's decision takes top-k and sums.

    It implements the ``Scores`` protocol. A segment is a set of entries that are ranked or summed
    together: a row, a column, or the whole tensor. In a collective call all ranks must name the
    same tensors; their order does not matter.
    """

    slices: Mapping[str, SliceOfTensor]
    """Tensor name -> this rank's slice of it."""
    score: Callable[[str], Tensor]
    """Function (tensor name) -> scores of this rank's slice of the tensor, fp32, 1-D. It is called
    anew for each use, so that no scores stay in memory."""
    live_mask: Callable[[str], Tensor]
    """Function (tensor name) -> mask of the live entries, which the optimizer steps, in this rank's
    slice of the tensor, bool, 1-D."""
    site_stats: Tensor
    """Statistics of the adapters, float64 [number of statistics, number of adapters], the same on
    every rank. The method updates them at each step from its probe of each adapter."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Tensor name -> shape of the whole tensor."""
        return {name: tensor_slice.shape for name, tensor_slice in self.slices.items()}

    def top_k(
        self, k: Mapping[str, int], by: Mapping[str, By], ties: Ties = "index"
    ) -> dict[str, Tensor]:
        """Choose the ``k`` entries of largest score in every segment. Collective.

        A segment is a row, a column or the whole tensor, as ``by`` says. Segments are whole: their
        entries on all ranks are ranked together.

        Args:
            k: tensor name -> number of entries to choose in each of its segments.
            by: tensor name -> what a segment of it is: "row" (each row), "column" (each column)
                or "tensor" (all of it).
            ties: how to choose among entries that equal the k-th largest (0 equals -0). "index":
                those of lowest index, so that exactly k are chosen over all ranks. "all": all of
                them, so k or more.

        Returns:
            Tensor name -> mask of the chosen entries in this rank's slice, bool, 1-D.

        Raises:
            ValueError: a segment has fewer entries than k, or k is not positive.
            FloatingPointError: on every rank, if any score on any rank is NaN or infinite.
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
        """Sum the scores of every segment: a row, a column or the whole tensor. Collective.

        The scores x_i of a tensor are first rounded to multiples of one number, ``unit``, so that
        their sum is exact in any order:

            sum = unit * sum_i round(x_i / unit),  unit = 2^(e - 40)

        Here 2^e is the power of two above the tensor's largest |x_i|. Each score adds an error of
        at most half a unit. Segments of 2^23 entries and more have a larger unit (``SUM_BITS``).

        Args:
            by: tensor name -> what a segment of it is: "row" (each row), "column" (each column)
                or "tensor" (all of it).

        Returns:
            Tensor name -> sum of each of its segments, float64 [segments], the same on every rank.

        Raises:
            FloatingPointError: on every rank, if any score on any rank is NaN or infinite.
        """
        names = sorted(by)
        # Scores are computed twice, so that those of one tensor at a time are in memory.
        largest = _largest(names, (self.score(name) for name in names))
        places = {name: self._binary_places(name, by[name], largest[name]) for name in names}
        scaled = (self.score(name).double() * 2.0 ** places[name] for name in names)
        totals = self._add_up(names, by, (x.round().long() for x in scaled))
        return {name: total.double() * 2.0 ** -places[name] for name, total in totals.items()}

    def live(self, by: Mapping[str, By]) -> dict[str, Tensor]:
        """Count the live entries of every segment: a row, a column or the whole tensor.

        An entry is live if the optimizer steps it. Collective.

        Args:
            by: tensor name -> what a segment of it is: "row" (each row), "column" (each column)
                or "tensor" (all of it).

        Returns:
            Tensor name -> count of each of its segments, int64 [segments], the same on every rank.
        """
        names = sorted(by)
        return self._add_up(names, by, (self.live_mask(name).long() for name in names))

    def spread(self, name: str, values: Tensor, by: By) -> Tensor:
        """Expand values given per row, column or tensor to one value per entry.

        E.g. with by="row", each entry gets the value of its row. Not a collective.

        Args:
            name: name of the tensor.
            values: one value for each segment: for each row ("row"), for each column ("column"),
                or a single one ("tensor"). 1-D.
            by: what a segment is: "row", "column" or "tensor".

        Returns:
            One value for each entry of this rank's slice of the tensor, 1-D, in the dtype of
            ``values``.
        """
        device = self.live_mask(name).device  # of the tensor's shard; ``values`` may be elsewhere
        if values.device != device:
            (values,) = moved(device, values.cpu())
        return values[segments_of(self.slices[name], by, device)]

    def _groups(self, names: Sequence[str], by: Mapping[str, By]) -> Iterator[list[str]]:
        """Yield tensor names in groups that ``top_k`` ranks with one set of collectives.

        A group has at most ``GROUP_ENTRIES`` entries of a rank and ``GROUP_SEGMENTS`` segments; a
        larger tensor is a group of its own. The groups are the same on every rank.

        Args:
            names: tensor names, in the order in which they are grouped.
            by: tensor name -> what a segment of it is: "row", "column" or "tensor".
        """
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
        """Choose the largest scores of several tensors with one set of collectives. Collective.

        The slices of the tensors are treated as one long slice whose segments are numbered
        consecutively.

        Args:
            group: tensor names.
            k: as in ``top_k``.
            by: as in ``top_k``.
            ties: as in ``top_k``.

        Returns:
            Tensor name -> mask of the chosen entries in this rank's slice, bool, 1-D.
        """
        shards = [self.score(name) for name in group]
        _largest(group, shards)  # only to refuse NaN and infinity
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
        """Return the number p such that scores are rounded to multiples of 2^-p for a sum.

        The sum of a segment's scores, in these units, fits in an int64. E.g. 39 for a segment of
        1,000 entries whose ``largest`` is 1.0 = 0.5 * 2^1.

        Args:
            name: name of the tensor.
            by: what a segment is: "row", "column" or "tensor".
            largest: largest absolute value of the tensor over all ranks.
        """
        size = _segment_size(self.slices[name].shape, by)
        return min(SUM_BITS, 63 - size.bit_length()) - math.frexp(largest)[1]

    def _add_up(
        self, names: Sequence[str], by: Mapping[str, By], shards: Iterable[Tensor]
    ) -> dict[str, Tensor]:
        """Sum integers over each row, column or tensor, and over all ranks. Collective.

        Args:
            names: tensor names.
            by: tensor name -> what a segment of it is: "row" (each row), "column" (each column)
                or "tensor" (all of it).
            shards: values of this rank's entries of each tensor, int64, 1-D, in the order of
                ``names``.

        Returns:
            Tensor name -> sum of each of its segments, int64 [segments], the same on every rank.
        """
        own = []
        for name, shard in zip(names, shards, strict=True):
            tensor_slice = self.slices[name]
            sums = shard.new_zeros(num_segments(tensor_slice.shape, by[name]))
            own.append(sums.index_add_(0, segments_of(tensor_slice, by[name], shard.device), shard))
        if not own:
            return {}
        totals = comm.sum_over_ranks(torch.cat(own)).split([len(sums) for sums in own])
        return dict(zip(names, totals, strict=True))


def segments_of(tensor_slice: SliceOfTensor, by: By, device: torch.device | None = None) -> Tensor:
    """Return the segment that each element of a slice lies in: its row, its column, or 0.

    Args:
        tensor_slice: the range of a flattened tensor's elements, and the shape of the tensor.
        by: what a segment is: "row", "column", or "tensor", which is all of it.
        device: device of the result.

    Returns:
        int64, 1-D, one number for each element: the index of its row ("row") or column ("column"),
        or 0 ("tensor").
    """
    index = torch.arange(
        tensor_slice.start, tensor_slice.start + tensor_slice.length, device=device
    )
    if by == "tensor":
        return torch.zeros_like(index)
    columns = math.prod(tensor_slice.shape[1:])
    return index // columns if by == "row" else index % columns


def num_segments(shape: tuple[int, ...], by: By) -> int:
    """Return the number of segments of a tensor.

    Args:
        shape: shape of the tensor.
        by: what a segment is: "row", "column", or "tensor", which is all of it and counts as 1.
    """
    return {"row": shape[0], "column": math.prod(shape[1:]), "tensor": 1}[by]


def _segment_size(shape: tuple[int, ...], by: By) -> int:
    return math.prod(shape) // num_segments(shape, by)


def falling_keys(values: Tensor) -> Tensor:
    """Map fp32 values to int64 keys in [0, 2^32), so that a larger value has a lower key.

    Keys can be compared byte by byte. Read as an integer, the bits of a positive float grow with
    its value, and those of a negative float, which has the highest bit set, with its magnitude:

        value   bits        key               value   bits        key
        2.0   0x40000000 -> 0x3FFFFFFF        -1.0  0xBF800000 -> 0xBF800000
        1.0   0x3F800000 -> 0x407FFFFF        -2.0  0xC0000000 -> 0xC0000000
        0.0   0x00000000 -> 0x7FFFFFFF        -0.0  becomes 0.0 when 0.0 is added
    """
    bits = (values.float() + 0.0).view(torch.int32).long()
    return torch.where(bits < 0, bits & 0xFFFFFFFF, 0x7FFFFFFF - bits)


def first_k(keys: Tensor, segments: Tensor, k: Tensor, ties: Ties) -> Tensor:
    """Choose the entries with the lowest keys of each segment by radix select. Collective.

    A segment is a set of entries that are ranked together, over all ranks.

    Args:
        keys: keys of this rank's entries, from ``falling_keys``, int64, 1-D.
        segments: number of the segment that each entry is in, counted from 0, int64, 1-D.
        k: number of entries to choose in each segment over all ranks, int64, one per segment.
        ties: how to choose among entries whose key equals the k-th lowest. "index": those of lowest
            index, so that exactly k are chosen. "all": all of them, so k or more.

    Returns:
        Mask of the chosen ones among this rank's entries, bool, 1-D.
    """
    near, segments_near, left = keys, segments, k
    prefix = torch.zeros_like(k)  # bytes of each segment's k-th key that are known so far
    for shift in SHIFTS:
        bins = _histogram(segments_near, near >> shift & (BINS - 1), len(k))
        below = bins.cumsum(1, dtype=torch.int32) - bins
        byte = (below < left[:, None]).sum(1) - 1
        left = left - below.gather(1, byte[:, None])[:, 0]
        prefix = prefix << 8 | byte
        # Only entries with this prefix can still be the k-th.
        same = near >> shift == prefix[segments_near]
        near, segments_near = near[same], segments_near[same]
    last = prefix[segments]
    if ties == "all":
        return keys <= last
    return (keys < last) | _first_ties(keys == last, segments, left)


def _histogram(segments: Tensor, byte: Tensor, count: int) -> Tensor:
    """Count entries of all ranks by segment and by one byte of their keys. Collective.

    Args:
        segments: number of the segment of each entry to count on this rank, int64, 1-D.
        byte: the byte of the key of each of these entries, 0 to 255, int64, 1-D.
        count: number of segments.

    Returns:
        Counts, int32 [count, 256], the same on every rank.
    """
    own = torch.bincount(segments * BINS + byte, minlength=count * BINS).view(count, BINS)
    return comm.sum_over_ranks(own.int())


def _first_ties(tied: Tensor, segments: Tensor, left: Tensor) -> Tensor:
    """Choose the tied entries of lowest index in each segment over all ranks. Collective.

    Args:
        tied: mask of this rank's entries that tie, bool, 1-D.
        segments: number of the segment that each of this rank's entries is in, int64, 1-D.
        left: number of tied entries to choose in each segment over all ranks, int64, one per
            segment.

    Returns:
        Mask of the chosen entries of this rank, bool, 1-D.

    Lower ranks hold lower indices. So the ties of a segment can be numbered over all ranks: an
    entry's number is the count of ties on lower ranks plus its number on this one. An entry is
    chosen if its number is below ``left``. Example on rank 1, with two segments:

        segments of its ties   0  1  0  0      ties on lower ranks    2 in segment 0, none in 1
        number on this rank    0  0  1  2      number over all ranks  2  0  3  4
        left = [4, 1]                          chosen                 yes, yes, yes, no
    """
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
    """Return the largest absolute value of every tensor over all ranks. Collective.

    Args:
        names: tensor names.
        shards: values of this rank's entries of each tensor, in the order of ``names``.

    Returns:
        Tensor name -> largest absolute value, the same on every rank.

    Raises:
        FloatingPointError: on every rank, if any value on any rank is NaN or infinite.
    """
    own = [shard.abs().amax() if len(shard) else shard.new_zeros(()) for shard in shards]
    if not own:
        return {}
    # A maximum over ranks may lose a NaN, but not an infinity.
    own_T = torch.stack(own).float().nan_to_num(nan=math.inf, posinf=math.inf)
    largest = dict(zip(names, comm.max_over_ranks(own_T).tolist(), strict=True))
    for name, value in largest.items():
        if math.isinf(value):
            raise FloatingPointError(f"importance scores of {name} hold NaN or infinity")
    return largest
