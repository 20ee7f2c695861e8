"""Pack documents into rows, and make the micro-batches of one rank from them.

A document is one tokenised example. A row is one sequence of a batch, one or more documents end to
end. A run trains on an endless stream of rows 0, 1, 2, ...: each epoch has all rows of the data set
once, in a new random order. So the position of a run in its data is one integer, the number of rows
of the stream that it has trained on. The stream does not depend on the number of ranks.

Suffixes of names are shapes: M is the number of rows of a micro-batch, T the number of tokens of
its longest row after padding.

``position_ids`` restart at 0 at each document, from which transformers sees that attention must
stay inside a document. It does so only without an ``attention_mask`` and with ``use_cache=False``,
and with flash attention only for M = 1.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from sparse_lora_dist.data.tokens import NOT_A_TARGET, Documents, Ints

FILLER = -1
"""Row number that stands for a filler row: a row without a loss that completes the last global
batch (the rows of one optimizer step over all ranks and micro-batches)."""
PAD_TO = 8
"""Padded row lengths are multiples of this many tokens, for which GPU matmuls are faster."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One or more documents end to end. All arrays are int64 [number of tokens]."""

    input_ids: Ints
    """Token ids."""
    labels: Ints
    """Target ids, not shifted; -100 for tokens without a loss."""
    position_ids: Ints
    """Positions, which restart at 0 where a document begins."""


class Rows:
    """The rows of one data set, as a list that depends on the data and the seed only.

    A run trains on the stream of rows, which goes through the list once in each epoch, each time in
    a new random order. A row has an index in the list, from 0 to len(self) - 1, and a number in the
    stream: 0, 1, 2, ... without end. The method ``index`` returns the index that belongs to a
    number.
    """

    def __init__(
        self, documents: Documents, order: Ints, bounds: Ints, *, sequence_length: int, seed: int
    ) -> None:
        """Make rows of documents: row r holds the documents ``order[bounds[r] : bounds[r + 1]]``.

        Args:
            documents: documents of the data set.
            order: int64 [number of documents], indices of documents, those of row 0 first.
            bounds: int64 [number of rows + 1], the place in ``order`` at which each row begins,
                and the number of documents at the end.
            sequence_length: most tokens of a row.
            seed: seed of the random orders of rows. The order of an epoch is drawn from this seed
                and the number of the epoch.
        """
        self.documents = documents
        self.sequence_length = sequence_length
        self.seed = seed
        self._order = order
        self._bounds = bounds
        self._epoch = -1
        self._permutation: Ints = np.empty(0, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._bounds) - 1

    def __getitem__(self, index: int) -> Row:
        """Return the row with this index in the data set, whose order is not that of the stream."""
        numbers = self.document_numbers(index)
        documents = [self.documents[n] for n in numbers]
        return Row(
            input_ids=np.concatenate([d.input_ids for d in documents]),
            labels=np.concatenate([d.labels for d in documents]),
            position_ids=np.concatenate([np.arange(len(d.input_ids)) for d in documents]),
        )

    def document_numbers(self, index: int) -> list[int]:
        """Return the indices in ``documents`` of the documents in a row, in order.

        Args:
            index: index of the row in the list (not its number in the stream).
        """
        assert 0 <= index < len(self), f"row {index} of {len(self)}"
        return [int(n) for n in self._order[self._bounds[index] : self._bounds[index + 1]]]

    def index(self, row_number: int, *, shuffle: bool) -> int:
        """Return the index in the list of a row of the stream.

        Args:
            row_number: number of the row in the stream, from 0.
            shuffle: True if each epoch has its own random order; False if each epoch goes through
                the list in order.

        Returns:
            Index in the list, from 0 to len(self) - 1.
        """
        epoch, place = divmod(row_number, len(self))
        if not shuffle:
            return place
        if epoch != self._epoch:
            generator = np.random.default_rng(np.random.SeedSequence([self.seed, epoch]))
            self._permutation, self._epoch = generator.permutation(len(self)), epoch
        return int(self._permutation[place])


def pack(documents: Documents, *, sequence_length: int, packing: bool, seed: int) -> Rows:
    """Put documents into rows of at most ``sequence_length`` tokens.

    With packing, the documents are taken in a random order, and each goes into the fullest row that
    still has room for it (best fit).

    Args:
        documents: documents of at most ``sequence_length`` tokens.
        sequence_length: most tokens of a row.
        packing: True to put as many documents into a row as fit; False to put one document into
            each row, in order.
        seed: seed of the order in which documents are packed, and of the order of rows in each
            epoch.

    Returns:
        The rows. Every document is in exactly one of them.
    """
    lengths = documents.lengths
    assert lengths.max(initial=0) <= sequence_length, "documents were cut for a shorter length"
    if packing:
        # spawn_key, as SeedSequence([seed]) would equal SeedSequence([seed, 0]) of the first epoch.
        generator = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(1,)))
        sequence = generator.permutation(len(documents))
        row_of = best_fit(lengths[sequence], sequence_length)
        order = sequence[np.argsort(row_of, kind="stable")]
        bounds = np.concatenate([[0], np.cumsum(np.bincount(row_of))])
    else:
        order, bounds = np.arange(len(documents)), np.arange(len(documents) + 1)
    return Rows(documents, order, bounds, sequence_length=sequence_length, seed=seed)


def best_fit(lengths: Ints, capacity: int) -> Ints:
    """Assign documents to rows by best fit: each goes into the fullest row that still has room for
    it, or into a new row. It takes about a microsecond per document.

        lengths 6, 5, 4, 3 with capacity 10: rows 0, 1, 0, 1
        (4 fits both and goes to row 0, which is fuller; 3 fits row 1 only)

    Args:
        lengths: int64 [number of documents], number of tokens of each, at most ``capacity``, in the
            order in which the documents are assigned.
        capacity: most tokens of a row.

    Returns:
        int64 [number of documents], the index of the row of each document. Rows are counted from 0
        in the order in which they are begun.
    """
    rows_with: dict[int, list[int]] = {}  # free tokens -> rows with exactly that many
    rooms: list[int] = []  # the keys of rows_with, sorted; at most `capacity` of them
    row_of, num_rows = np.empty(len(lengths), dtype=np.int64), 0
    for document, length in enumerate(lengths.tolist()):
        at = bisect_left(rooms, length)
        if at < len(rooms):
            room = rooms[at]
            row = rows_with[room].pop()
            if not rows_with[room]:
                del rows_with[room], rooms[at]
        else:
            room, row, num_rows = capacity, num_rows, num_rows + 1
        row_of[document] = row
        if (left := room - length) > 0:
            if left not in rows_with:
                rows_with[left] = []
                insort(rooms, left)
            rows_with[left].append(row)
    return row_of


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One micro-batch of one rank, for language modelling. All tensors are int64."""

    input_ids_MT: Tensor
    """[M, T], token ids, padded."""
    labels_MT: Tensor
    """[M, T], target ids, not shifted; -100 for tokens without a loss."""
    position_ids_MT: Tensor
    """[M, T], positions, which restart at 0 at each document and where the padding begins."""
    rows_M: tuple[int, ...]
    """Row numbers in the stream of rows that a run trains on (see ``Rows``); -1 for filler rows."""
    lengths_M: tuple[int, ...]
    """Number of tokens of each row, without the padding at its end; 0 for filler rows."""

    @property
    def num_targets(self) -> int:
        """Number of tokens that have a loss, after labels are shifted by one."""
        return int((self.labels_MT[:, 1:] != NOT_A_TARGET).sum())


class MicroBatch(Protocol):
    """Attributes of a micro-batch that an optimizer step needs, whatever the task. ``Batch`` and
    ``LabelledBatch`` have them, and describe them."""

    @property
    def input_ids_MT(self) -> Tensor: ...  # noqa: D102

    @property
    def rows_M(self) -> tuple[int, ...]: ...  # noqa: D102

    @property
    def lengths_M(self) -> tuple[int, ...]: ...  # noqa: D102

    @property
    def num_targets(self) -> int: ...  # noqa: D102


class Collate(Protocol):
    """Type of the functions that make a micro-batch of rows, one for each task: ``packed_batch``
    and ``labelled_batch``.

    Args:
        rows: rows of the data set.
        numbers: row numbers in the stream of rows (see ``Rows``), one for each row of the batch;
            ``FILLER`` stands for a filler row, which has no loss.
        pad_id: token id used as padding.
        shuffle: True to read each epoch in its own random order; False to keep the order of
            ``rows``.

    Returns:
        The micro-batch, which is a ``MicroBatch``, with its tensors on CPU.
    """

    def __call__(  # noqa: D102
        self, rows: Rows, numbers: tuple[int, ...], *, pad_id: int, shuffle: bool
    ) -> Any: ...


def micro_batches(
    rows: Rows,
    *,
    first_row: int,
    end_row: int,
    rank: int,
    world_size: int,
    micro_batch_size: int,
    accumulation: int,
    pad_id: int,
    collate: Collate,
    shuffle: bool = True,
) -> list[Any]:
    """Make one rank's micro-batches of one global batch, which is the rows of one optimizer step
    over all ranks and micro-batches. Not a collective.

    Row i of the global batch goes to micro-batch ``i // (world_size * micro_batch_size)`` of rank
    ``(i // micro_batch_size) % world_size``. Rows from ``end_row`` on become filler rows: one pad
    token, no target. So the last global batch neither drops nor repeats rows, and its summed loss
    divided by its number of targets is an exact mean.

        2 ranks, micro_batch_size 2, accumulation 2, first_row 0:
        rank 0 has rows (0, 1) and (4, 5); rank 1 has rows (2, 3) and (6, 7)

    Args:
        rows: rows of the data set.
        first_row: number, in the stream of rows (see ``Rows``), of the first row of the global
            batch.
        end_row: number of the first row of the stream that is no longer used. The rows used are
            ``first_row`` to ``end_row`` - 1.
        rank: the rank whose micro-batches are made.
        world_size: number of ranks.
        micro_batch_size: number of rows per rank in one forward.
        accumulation: number of micro-batches per optimizer step.
        pad_id: token id used as padding.
        collate: function that makes a micro-batch of rows.
        shuffle: True to read each epoch in its own random order; False to keep the order of
            ``rows``.

    Returns:
        ``accumulation`` micro-batches of ``micro_batch_size`` rows each, filler rows included.
    """
    assert 0 <= rank < world_size, f"rank {rank} of {world_size}"
    batches = []
    for step in range(accumulation):
        start = first_row + (step * world_size + rank) * micro_batch_size
        wanted = range(start, start + micro_batch_size)
        numbers = tuple(n if n < end_row else FILLER for n in wanted)
        batches.append(collate(rows, numbers, pad_id=pad_id, shuffle=shuffle))
    return batches


def packed_batch(rows: Rows, numbers: tuple[int, ...], *, pad_id: int, shuffle: bool) -> Batch:
    """Make a micro-batch for language modelling: packed rows, padded to the longest of them.

    Rows are padded with their last token, and a filler row is one token without a loss. A pad token
    would do the same, but where its embedding is zero, some models divide by the norm of it.

    Args:
        rows: rows of the data set.
        numbers: row numbers in the stream of rows (see ``Rows``), one for each row of the batch;
            ``FILLER`` stands for a filler row.
        pad_id: token id used as padding by other tasks.
        shuffle: True to read each epoch in its own random order; False to keep the order of
            ``rows``.

    Returns:
        The batch, with its tensors on CPU.
    """
    parts = [
        _filler(rows) if n == FILLER else rows[rows.index(n, shuffle=shuffle)] for n in numbers
    ]
    length = padded_length([len(p.input_ids) for p in parts], rows.sequence_length)
    return Batch(
        input_ids_MT=_stack(
            [np.pad(p.input_ids, (0, length - len(p.input_ids)), mode="edge") for p in parts]
        ),
        labels_MT=padded([p.labels for p in parts], length, NOT_A_TARGET),
        # Positions restart at the padding, so that it is a document of its own. If they continued,
        # attention would see it as part of the last document.
        position_ids_MT=_stack(
            [np.append(p.position_ids, np.arange(length - len(p.position_ids))) for p in parts]
        ),
        rows_M=numbers,
        lengths_M=tuple(
            0 if n == FILLER else len(p.input_ids) for n, p in zip(numbers, parts, strict=True)
        ),
    )


def _filler(rows: Rows) -> Row:
    return Row(
        input_ids=rows[0].input_ids[:1],
        labels=np.array([NOT_A_TARGET]),
        position_ids=np.array([0]),
    )


def padded_length(lengths: Sequence[int], most: int) -> int:
    """Return the number of tokens to which the rows of a micro-batch are padded: the smallest
    multiple of ``PAD_TO`` that is not less than the longest row, but at most ``most``.

    Args:
        lengths: number of tokens of each row.
        most: largest padded length, which need not be a multiple of ``PAD_TO``.
    """
    return min(-(-max(lengths) // PAD_TO) * PAD_TO, most)


def padded(rows: Sequence[Ints], length: int, value: int) -> Tensor:
    """Pad each row with ``value`` at its end, and stack the rows.

    Args:
        rows: arrays int64 [number of tokens of the row].
        length: number of tokens of each padded row.
        value: number to pad with.

    Returns:
        int64 [len(rows), length].
    """
    return _stack([np.pad(row, (0, length - len(row)), constant_values=value) for row in rows])


def _stack(rows: Sequence[Ints]) -> Tensor:
    return torch.from_numpy(np.stack(rows).astype(np.int64))
