"""Parts of a run in which ranks work by themselves, and what they owe each other at the end."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

from safetensors import SafetensorError

from sparse_lora_dist.distributed import comm
from sparse_lora_dist.errors import UserError


@contextmanager
def fail_together(phase: str) -> Iterator[None]:
    """If any rank fails inside, all ranks raise, so that none waits for one that is gone.

    Only for phases without collectives of their own: a rank that fails between two of them would
    leave the others waiting inside. Foreign exceptions pass through on the rank that has them, with
    their traceback.
    """
    failure: Exception | None = None
    try:
        yield
    # No space, no permission, a file gone or damaged: the message says it all.
    except (OSError, SafetensorError) as error:
        failure = UserError(f"{phase}: {error}")
    except Exception as error:
        failure = error
    said = comm.gather_objects(str(failure) if failure else None, after=phase)
    if isinstance(failure, UserError):
        failure.shared = True
    if failure:
        raise failure
    first = next((r for r, text in enumerate(said) if text is not None), None)
    if first is not None:
        raise UserError(f"rank {first} failed while {phase}: {cast(str, said[first])}", shared=True)


@contextmanager
def first_on_its_node() -> Iterator[None]:
    """One rank of every node runs the body first, so that the node's others find what it cached:
    nodes may share no disk. No collectives inside."""
    is_first = comm.is_first_on_its_node()
    if not is_first:
        comm.barrier()
    try:
        yield
    finally:
        if is_first:
            comm.barrier()
