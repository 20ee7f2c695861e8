"""Import large libraries faster."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def large_imports() -> Iterator[None]:
    """Import large libraries without garbage collection in between.

    An import makes objects that live as long as the process, and the collector would look through
    all of them again and again: for torch, transformers and DeepSpeed that is a third of the time
    (``benchmarks/start.py``). Afterwards they are frozen: no later collection looks at them.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
