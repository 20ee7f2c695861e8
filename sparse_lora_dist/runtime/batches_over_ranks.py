"""Spread batches over the ranks, so that results do not depend on the number of ranks."""

from collections.abc import Callable, Sequence
from typing import TypeVar

from sparse_lora_dist.distributed import comm
from sparse_lora_dist.distributed.console import with_progress
from sparse_lora_dist.runtime import watchdog

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_batches(
    items: Sequence[Item],
    batch_size: int,
    work: Callable[[Sequence[Item]], Sequence[Result]],
    *,
    name: str,
) -> list[Result]:
    """Apply ``work`` to batches of ``items``, spread over the ranks. Collective.

    Batch i holds the items from i * batch_size to (i + 1) * batch_size - 1, and goes to rank
    i % (number of ranks). So the batches are the same for any number of ranks. This matters since
    the rounding of a result depends on what else is in its batch. If the number of batches is not a
    multiple of the number of ranks, the ranks that have one batch less also run the last of all
    batches and drop its results, because every forward is a collective.

    Args:
        items: items to work on, e.g. prompts; the same on every rank.
        batch_size: number of items per batch.
        work: function from the items of one batch to one result for each item. It may contain
            collectives, since all ranks call it equally often.
        name: name of this work, as the watchdog's phase and as label of rank 0's progress.

    Returns:
        One result for each item, in the order of ``items``, on every rank.
    """
    starts = range(0, len(items), batch_size)
    rank, world_size = comm.rank(), comm.world_size()
    own = []
    for first in with_progress(starts[::world_size], name):
        watchdog.set_phase(name)  # a batch is progress, even if it needs no collective
        start = min(first + rank * batch_size, starts[-1])
        own.append(list(work(items[start : start + batch_size])))
    of_rank = comm.gather_objects(own)
    batches = (of_rank[i % world_size][i // world_size] for i in range(len(starts)))
    return [result for batch in batches for result in batch]
