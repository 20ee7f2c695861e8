"""Import large libraries faster."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

from sparse_lora_dist.errors import UserError, in_words


@contextmanager
def large_imports() -> Iterator[None]:
    """Import large libraries without garbage collection in between.

    An import makes objects that live as long as the process, and the collector would look through
    all of them again and again: for torch, transformers and DeepSpeed that is a third of the time
    (``benchmarks/start.py``). Afterwards they are frozen: no later collection looks at them.

    Raises:
        UserError: a library cannot be imported.
    """
    gc.disable()
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # what it makes of an environment variable, or of another version
        raise UserError(
            f"A library cannot be imported: {in_words(error)}. Check the environment variables "
            "that it reads (such as DS_ACCELERATOR, TORCH_LOGS or HF_...), or install again "
            "(make setup). --debug shows where it happened."
        ) from error
    finally:
        gc.freeze()
        gc.enable()
