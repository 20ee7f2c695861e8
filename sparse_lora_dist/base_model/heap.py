"""glibc's heap while a base is loaded.

Shares stay, what they are made from goes, and the two alternate. glibc raises the size from which
blocks are mapped by themselves to that of the largest block freed so far, so that after the first
tensors both lie in one heap, which keeps what was freed between shares: at 1.1 B parameters on one
rank half as much again as the shard (``benchmarks/load.py``), and where 64 ranks make the shares of
70 B small, as much again (``benchmarks/rehearsal_70b.py``).
"""

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h

MAPPED_FROM = 2**20
"""Bytes. Above the scratch of a chunk of ``nf4.quantize``, which would otherwise be mapped, zeroed
by the kernel and returned for each of its operations: a third more time."""
KEPT_FREE = 2**24
"""Bytes at the heap's end, for that scratch."""
SHARE_MAPPED_FROM = 2**14
"""Of what stays; it takes whole pages."""
USUAL = int(os.environ.get("MALLOC_MMAP_THRESHOLD_", 2**25)), 2**26
"""Where glibc's own adjusting ends, or what the user set."""

_now = USUAL


@contextmanager
def large_blocks_apart() -> Iterator[None]:
    """Large blocks inside go back to the system when they are freed. Afterwards the heap is as it
    would be after the first large block was freed: glibc does not start to adjust again."""
    with _mapped_from(MAPPED_FROM, KEPT_FREE):
        yield


def apart(share: Tensor) -> Tensor:
    """A tensor in host memory that stays, out of the way of what goes; itself if it is large, and
    so lies apart already."""
    if share.nbytes >= MAPPED_FROM:
        return share
    with _mapped_from(SHARE_MAPPED_FROM, KEPT_FREE):
        return share.clone()


@contextmanager
def _mapped_from(size: int, kept_free: int) -> Iterator[None]:
    global _now
    before, _now = _now, (size, kept_free)
    _set(*_now)
    try:
        yield
    finally:
        _now = before
        _set(*_now)


def _set(mapped_from: int, kept_free: int) -> None:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # another C library has other ways
        mallopt(M_MMAP_THRESHOLD, mapped_from)
        mallopt(M_TRIM_THRESHOLD, kept_free)
