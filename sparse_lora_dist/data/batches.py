"""Rows of the stream -> the micro-batches of one rank.

Shapes: M rows of a micro-batch, T tokens of its longest row (padded). Attention stays inside a
document because ``position_ids`` restart there; that holds in transformers only with no
``attention_mask`` and ``use_cache=False``, and with flash attention only for M = 1.
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
"""The row number of a row that only fills up the last global batch."""
PAD_TO = 8
"""Row lengths are multiples of this many tokens, as GPU matmuls like them."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One micro-batch of one rank, int64."""

    input_ids_MT: Tensor
    labels_MT: Tensor
    """Not shifted; -100 where there is nothing to learn."""
    position_ids_MT: Tensor
    """Restart at 0 at each document and where the padding begins."""
    rows_M: tuple[int, ...]
    """Row numbers in the stream; -1 for filler rows."""
    lengths_M: tuple[int, ...]
    """Tokens of each row, at its front: 0 for filler, padding not counted."""

    @property
    def num_targets(self) -> int:
        """Tokens the shifted loss is taken on."""
        return int((self.labels_MT[:, 1:] != NOT_A_TARGET).sum())

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on ``device``."""
        return Batch(
            input_ids_MT=self.input_ids_MT.to(device),
            labels_MT=self.labels_MT.to(device),
            position_ids_MT=self.position_ids_MT.to(device),
            rows_M=self.rows_M,
            lengths_M=self.lengths_M,
        )


class MicroBatch(Protocol):
    """What a step asks of a micro-batch, whatever the task."""

    @property
    def input_ids_MT(self) -> Tensor: ...  # noqa: D102

    @property
    def rows_M(self) -> tuple[int, ...]: ...  # noqa: D102

    @property
    def lengths_M(self) -> tuple[int, ...]: ...  # noqa: D102

    @property
    def num_targets(self) -> int: ...  # noqa: D102


class Collate(Protocol):
    """Rows of these numbers of the stream, ``FILLER`` for none -> a micro-batch."""

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
    """This rank's part of the global batch that begins at row ``first_row`` of the stream.

    Row i of the global batch goes to micro-batch ``i // (world_size * micro_batch_size)`` and rank
    ``(i // micro_batch_size) % world_size``. Rows from ``end_row`` on become filler rows, one pad
    token and no target: the last partial batch drops and repeats nothing, and a loss divided
    by the global number of targets is exact.

    Args:
        shuffle: take each epoch in its own seeded order; False keeps the order of the list.

    Returns:
        ``accumulation`` batches of ``micro_batch_size`` rows, filler included.
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
    """The rows of these numbers as they were packed."""
    filler = Row(
        input_ids=np.array([pad_id]),
        labels=np.array([NOT_A_TARGET]),
        position_ids=np.array([0]),
    )
    parts = [filler if n == FILLER else rows[rows.index(n, shuffle=shuffle)] for n in numbers]
    length = padded_length([len(p.input_ids) for p in parts], rows.sequence_length)
    return Batch(
        input_ids_MT=padded([p.input_ids for p in parts], length, pad_id),
        labels_MT=padded([p.labels for p in parts], length, NOT_A_TARGET),
        # Padding is a document of its own: positions that went on would join it to the last.
        position_ids_MT=_stack(
            [np.append(p.position_ids, np.arange(length - len(p.position_ids))) for p in parts]
        ),
        rows_M=numbers,
        lengths_M=tuple(0 if p is filler else len(p.input_ids) for p in parts),
    )


def padded_length(lengths: Sequence[int], most: int) -> int:
    """Tokens of every row of a micro-batch whose rows have ``lengths``."""
    return min(-(-max(lengths) // PAD_TO) * PAD_TO, most)


def padded(rows: Sequence[Ints], length: int, value: int) -> Tensor:
    """[M, length] int64, each row filled up with ``value``."""
    return _stack([np.pad(row, (0, length - len(row)), constant_values=value) for row in rows])


def _stack(rows: Sequence[Ints]) -> Tensor:
    return torch.from_numpy(np.stack(rows).astype(np.int64))
