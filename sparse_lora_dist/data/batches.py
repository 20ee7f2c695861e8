"""Make the micro-batches of one rank from the stream of rows that a run trains on (see ``Rows``).

Suffixes of names are shapes: M is the number of rows of a micro-batch, T the number of tokens of
its longest row after padding.

``position_ids`` restart at 0 at each document, from which transformers sees that attention must
stay inside a document. It does so only without an ``attention_mask`` and with ``use_cache=False``,
and with flash attention only for M = 1.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from sparse_lora_dist.data.packing import Row, Rows
from sparse_lora_dist.data.tokens import NOT_A_TARGET, Ints

FILLER = -1
"""Row number that stands for a filler row: a row without a loss that completes the last global
batch (the rows of one optimizer step over all ranks and micro-batches)."""
PAD_TO = 8
"""Padded row lengths are multiples of this many tokens, for which GPU matmuls are faster."""


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
