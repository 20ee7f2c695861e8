"""Phases in which each rank works alone: failing together, and one rank of a node going first."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

from safetensors import SafetensorError

from sparse_lora_dist.distributed import comm
from sparse_lora_dist.errors import UserError


@contextmanager
def fail_together(phase: str) -> Iterator[None]:
    """Context manager: if the body fails on any rank, raise on all ranks. Collective.

    Without it the other ranks would wait in their next collective for a rank that is gone. The body
    must contain no collectives: a rank that fails between two of them would leave the others
    waiting inside.

    Args:
        phase: what the body does, as a gerund for messages: ``"reading the data"``.

    Raises:
        UserError: on the rank that failed, its own UserError, or the text of an OSError or
            SafetensorError; on the other ranks, the message of the first rank that failed.
        Exception: any other exception, on the rank that raised it, with its traceback.
    """
    failure: Exception | None = None
    try:
        yield
    # No space, no permission, a missing or damaged file: a traceback would add nothing.
    except (OSError, SafetensorError) as error:
        failure = UserError(f"{phase}: {error}")
    except Exception as error:
        failure = error
    failures = comm.gather_objects(str(failure) if failure else None, after=phase)
    if isinstance(failure, UserError):
        failure.shared = True
    if failure:
        raise failure
    first = next((r for r, text in enumerate(failures) if text is not None), None)
    if first is not None:
        message = cast(str, failures[first])
        raise UserError(f"rank {first} failed while {phase}: {message}", shared=True)


@contextmanager
def first_on_its_node() -> Iterator[None]:
    """Context manager: one rank of each node runs the body before the node's other ranks.

    The others then find what it downloaded or cached on the node's disk. Collective; the body must
    contain no collectives.
    """
    is_first = comm.is_first_on_its_node()
    if not is_first:
        comm.barrier()
    try:
        yield
    finally:
        if is_first:
            comm.barrier()
