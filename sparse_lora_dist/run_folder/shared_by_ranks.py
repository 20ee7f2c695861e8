"""Check that all ranks see the run folder in which rank 0 holds the lock.

Every rank writes its part of a checkpoint there. On a disk of each node, or in a node's /tmp, the
run would train until its first save, and keep nothing.
"""

import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sparse_lora_dist.distributed import comm
from sparse_lora_dist.errors import UserError
from sparse_lora_dist.run_folder import lock

PATIENCE_S = 15.0
"""Longest time in seconds until a shared file system must show a file that another node has just
written. NFS remembers for a while that a file did not exist."""
LOOK_S = 0.2
MOST_SHOWN = 4


@contextmanager
def shared_by_all_ranks(folder: Path) -> Iterator[None]:
    """Context manager: check on entry that every rank sees and may write the run folder whose lock
    rank 0 holds. Collective.

    Args:
        folder: the run folder.

    Raises:
        UserError: some ranks do not see the folder, or cannot write into it; on every rank.
    """
    token = comm.broadcast_object(lock.own_token())
    own = socket.gethostname(), _problem(folder, token)
    found = comm.gather_objects(own, after="looking for the run folder")
    wrong = [f"node {host} (rank {r}): {what}" for r, (host, what) in enumerate(found) if what]
    if wrong:
        more = f"; and {len(wrong) - MOST_SHOWN} more" if len(wrong) > MOST_SHOWN else ""
        raise UserError(
            f"--output_dir {folder} is not one folder for all ranks. Rank 0 writes it on node "
            f"{found[0][0]}, but not all ranks see and may write that folder: "
            f"{'; '.join(wrong[:MOST_SHOWN])}{more}. Every rank saves its part of a checkpoint "
            "there. Choose a folder on a file system that all nodes share, which /tmp, /dev/shm "
            "and a node's own disk are not.",
            shared=True,
        )
    yield


def _problem(folder: Path, token: str) -> str:
    """Return what is wrong with the run folder on this rank, or "" if nothing is.

    Args:
        folder: the run folder.
        token: random text that rank 0 has written into the lock file.
    """
    deadline = time.monotonic() + PATIENCE_S
    while problem := _unseen(folder, token):
        if time.monotonic() > deadline:
            return problem
        time.sleep(LOOK_S)
    return "" if os.access(folder, os.W_OK | os.X_OK) else "it may not write into the folder"


def _unseen(folder: Path, token: str) -> str:
    try:
        os.listdir(folder)  # NFS asks its server again when a folder is opened
        seen = lock.token_in(folder)
    except OSError as error:
        return f"it does not see the folder ({error.strerror})"
    if seen is None:
        return "it sees another folder of this name, in which rank 0 has written nothing"
    return "" if seen == token else "it sees another folder of this name, with the lock of a job"
