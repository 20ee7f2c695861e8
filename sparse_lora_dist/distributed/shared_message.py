"""Print a message that all ranks of a machine have, once, and before any of them ends.

Launchers end all ranks as soon as one has ended, often before the others have printed anything. So
the first rank that arrives here prints the message, whichever rank it is, and the ranks of a
machine end together:

    first rank    binds a socket ── prints ── listens ── waits for the others ── closes it
    other ranks   find it bound ────────────── connect ── wait until it is closed

The socket has a name in Linux's abstract namespace, which belongs to one launch and is gone when
its process ends: nothing is left on a disk, and the process group need not exist yet. All waits
end after ``WAIT_S``. A rank that then has not seen the message printed prints it itself.
"""

import hashlib
import os
import socket
import struct
import sys
import time
from collections.abc import Mapping
from contextlib import suppress

from sparse_lora_dist.distributed.launch import Launch

WAIT_S = 5.0
"""Longest time in seconds that a rank waits for the other ranks of its machine."""
RETRY_S = 0.02
OF_ONE_RANK = ("--local_rank", "--local-rank")
"""Beginnings of the word that DeepSpeed's launcher adds to the command line of each rank."""
AGAIN = b"again"
"""Answer to a rank that is not of the launch of the rank that answers."""


def name_of(launch: Launch, environ: Mapping[str, str]) -> str:
    """Return the name of the socket at which the ranks of one launch meet on their machine.

    Args:
        launch: rank and world size of this process.
        environ: the environment variables of this process. mpirun sets no address and port, but a
            namespace of its own, or is the parent of all ranks of a machine.
    """
    place = f"{launch.address}:{launch.port}"
    if launch.address is None or launch.port is None:
        place = environ.get("PMIX_NAMESPACE") or f"child of {os.getppid()}"
    typed = [word for word in sys.argv if not word.startswith(OF_ONE_RANK)]
    with suppress(OSError):  # the folder may have been removed
        typed.append(os.getcwd())
    words = [launch.launcher, str(launch.world_size), place, *typed]
    digest = hashlib.sha256("\0".join(words).encode(errors="replace")).hexdigest()[:32]
    return f"\0sparse_lora_dist.{os.getuid()}.{digest}"


def print_once(message: str, launch: Launch) -> None:
    """Print a message on stderr, once for all ranks of this machine that call this function.

    Args:
        message: the text to print, which says the same on all ranks.
        launch: rank and world size of this process.
    """
    deadline = time.monotonic() + WAIT_S
    while launch.local_size > 1 and time.monotonic() < deadline:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as end:
            try:
                end.bind(name_of(launch, os.environ))
            except OSError:  # another rank is here already
                if _has_printed(end, launch, deadline):
                    return
            else:
                _print(message)
                _wait_for_others(end, launch, deadline)
                return
        time.sleep(RETRY_S)
    _print(message)


def tell_printed(launch: Launch) -> None:
    """Tell a rank that waits in ``print_once`` that this rank has printed a message of its own."""
    with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as end:
        end.connect(name_of(launch, os.environ))
        end.send(str(launch.local_rank).encode())


def _print(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def _has_printed(end: socket.socket, launch: Launch, deadline: float) -> bool:
    """Wait for the rank that was first, and return True if it has printed the message. Return False
    at once if it is still printing."""
    end.settimeout(max(RETRY_S, deadline - time.monotonic()))
    try:
        end.connect(name_of(launch, os.environ))
        if _user(end) != os.getuid():
            return False
        end.send(str(launch.local_rank).encode())
        return end.recv(len(AGAIN)) != AGAIN
    except TimeoutError:
        return True  # it listens, so it has printed
    except OSError:
        return False


def _user(end: socket.socket) -> int:
    """Return the user of the process at the other end of a socket."""
    credentials = end.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return int(struct.unpack("3i", credentials)[1])


def _wait_for_others(end: socket.socket, launch: Launch, deadline: float) -> None:
    """Wait until all other ranks of this machine have printed a message or need not to."""
    arrived, seen = [], {str(launch.local_rank).encode()}
    with suppress(OSError):
        end.listen(launch.local_size)
        while len(seen) < launch.local_size and time.monotonic() < deadline:
            end.settimeout(max(RETRY_S, deadline - time.monotonic()))
            other, _ = end.accept()
            other.settimeout(1)
            rank = other.recv(16)
            if rank in seen:  # two launches with the same command at the same place
                other.send(AGAIN)
                other.close()
            arrived.append(other)
            seen.add(rank)
    for other in arrived:
        other.close()
