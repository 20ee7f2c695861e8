"""glibc's heap while a base is loaded.

Shares stay, what they are made from goes, and the two alternate. glibc raises the size from which
blocks are mapped by themselves to that of the largest block freed so far, so that after the first
tensors both lie in one heap, which keeps what was freed between shares: at 1.1 B parameters on one
rank half as much again as the shard (``benchmarks/load.py``).
"""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h

MAPPED_FROM = 2**20
"""Bytes. Above the scratch of a chunk of ``nf4.quantize``, which would otherwise be mapped, zeroed
by the kernel and returned for each of its operations: a third more time."""
KEPT_FREE = 2**24
"""Bytes at the heap's end, for that scratch."""
MOST_MAPPED_FROM, MOST_KEPT_FREE = 2**25, 2**26
"""Where glibc's own adjusting ends."""


@contextmanager
def large_blocks_apart() -> Iterator[None]:
    """Large blocks inside go back to the system when they are freed. Afterwards the heap is as it
    would be after the first large block was freed: glibc does not start to adjust again."""
    _set(MAPPED_FROM, KEPT_FREE)
    try:
        yield
    finally:
        _set(MOST_MAPPED_FROM, MOST_KEPT_FREE)


def _set(mapped_from: int, kept_free: int) -> None:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # another C library has other ways
        mallopt(M_MMAP_THRESHOLD, mapped_from)
        mallopt(M_TRIM_THRESHOLD, kept_free)
