"""Return freed heap memory to the system while shards are created.

Each shard stays allocated, and the buffers that it is made from are freed. In glibc's heap shards
therefore alternate with gaps of free memory. glibc does not return the gaps, and torch's aligned
requests seldom fit into a gap of the same size, so the heap keeps growing. With a 70B model on 64
ranks the gaps take as much memory as the shards (``benchmarks/rehearsal_70b.py``). So glibc's
``malloc_trim`` is called after each shard.
"""

import ctypes

KEPT_FREE = 2**24
"""Bytes left free at the end of the heap, as scratch memory for the next shard."""

_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc only


def return_gaps() -> None:
    """Return the free pages inside this process's heap to the system. Does nothing without glibc.

    Call it after each shard is created.
    """
    if _trim is not None:
        _trim(ctypes.c_size_t(KEPT_FREE))
