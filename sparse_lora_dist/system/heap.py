"""glibc's heap while shares are made.

A share stays, what it was made from goes, and the two alternate. glibc keeps the gaps, and torch's
aligned requests seldom fit the gap that an equal one left, so that the heap grows on: where 64
ranks make the shares of 70 B small, by as much again as the shares
(``benchmarks/rehearsal_70b.py``).
"""

import ctypes

KEPT_FREE = 2**24
"""Bytes at the heap's end, for the scratch of the next share."""

_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # another C library has other ways


def return_gaps() -> None:
    """Give the free pages inside the heap back to the system."""
    if _trim is not None:
        _trim(ctypes.c_size_t(KEPT_FREE))
