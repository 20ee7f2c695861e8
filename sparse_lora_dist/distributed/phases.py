"""Context managers for work that each rank does by itself, without collectives.

``fail_together`` makes all ranks fail if one fails. ``first_on_its_node`` lets one rank of each
node work before the others.
"""

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

from safetensors import SafetensorError

from sparse_lora_dist.distributed import comm
from sparse_lora_dist.errors import HeldError, StorageError, UserError
from sparse_lora_dist.system.machine_errors import in_plain_words

PASSING = (errno.EIO, errno.ESTALE, errno.ENOSPC, errno.EDQUOT, errno.ETIMEDOUT, errno.EREMOTEIO)
"""Errors of storage that may be gone when a job is started again."""
KINDS: tuple[type[UserError], ...] = (StorageError, HeldError)
"""Kinds of UserError that all ranks raise if one does, since they have exit statuses of their
own."""


@contextmanager
def fail_together(phase: str, *, may_pass: bool = False) -> Iterator[None]:
    """Context manager that raises on all ranks if the body fails on any rank. Collective.

    All ranks must enter it. At the end of the body they tell each other whether it failed. Without
    this the other ranks would wait in their next collective for a rank that is gone. The body must
    contain no collectives: a rank that fails before one would leave the others waiting inside.

    Args:
        phase: what the body does, used in messages after "while", such as "reading the data".
        may_pass: True if the body writes results, into a folder that was checked to be writable at
            the start. Errors of storage that may pass, such as a full disk or one that became
            read-only meanwhile, are then raised as StorageError, with which the program's exit
            status asks to be started again.

    Raises:
        UserError: the body failed on some rank. If it raised a UserError on this rank, that error
            is raised. If it raised an OSError or SafetensorError on this rank, a UserError with its
            text is raised. If it did not fail on this rank, a UserError with the message of the
            first rank that failed is raised, of the same kind (``KINDS``).
        Exception: the body raised any other exception on this rank, which is raised unchanged.
    """
    failure: Exception | None = None
    try:
        yield
    # No space, no permission, a missing or damaged file: a traceback would add nothing.
    except (OSError, SafetensorError) as error:
        # A disk that is still read-only at the next start is refused there, before any work.
        passes = passes_later(error) or getattr(error, "errno", None) == errno.EROFS
        kind = StorageError if may_pass and passes else UserError
        words = in_plain_words(error) or f"An error occurred while {phase}: {error}"
        failure = kind(words)
        failure.__cause__ = error  # for the traceback of --debug
    except Exception as error:
        failure = error
    own_kind = next((kind for kind in KINDS if isinstance(failure, kind)), UserError)
    own = (str(failure), own_kind.__name__) if failure else None
    failures = comm.gather_objects(own, after=phase)
    if isinstance(failure, UserError):
        failure.shared = True
        failure.found_by = _found_by(comm.rank(), phase, failures)
    if failure:
        raise failure
    first = next((r for r, found in enumerate(failures) if found is not None), None)
    if first is not None:
        message, name = cast(tuple[str, str], failures[first])
        kind = next((kind for kind in KINDS if kind.__name__ == name), UserError)
        raise kind(f"{_found_by(first, phase, failures)}{message}", shared=True)


def _found_by(rank: int, phase: str, failures: list[tuple[str, str] | None]) -> str:
    """Return the beginning of the message about a rank that failed. It is empty if rank 0 failed,
    which does most work for all ranks."""
    return f"rank {rank} failed while {phase}: " if failures[0] is None else ""


def passes_later(error: OSError | SafetensorError) -> bool:
    """Return True if an error of storage may be gone later. safetensors gives its number as text:
    "I/O error: No space left on device (os error 28)"."""
    if isinstance(error, OSError):
        return error.errno in PASSING
    number = re.search(r"\(os error (\d+)\)", str(error))
    return number is not None and int(number[1]) in PASSING


@contextmanager
def first_on_its_node() -> Iterator[None]:
    """Context manager in which one rank of each node runs the body before the node's other ranks.

    The rank that goes first is the one with local rank 0. The other ranks then find on the node's
    disk what it downloaded or cached. Collective: all ranks must enter it, but the body itself must
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
