"""Who wrote a file, and is that process still there? A number alone would not tell: hosts,
containers and later processes use the same."""

import os
import signal
import socket
from dataclasses import dataclass
from functools import cache
from pathlib import Path


@dataclass(frozen=True, kw_only=True, slots=True)
class Process:
    """One process among all that ever ran on any host."""

    host: str
    pids: str
    """Which numbering of processes ``pid`` belongs to: containers of one host have their own, and
    so has a host after each start."""
    pid: int
    started: int
    """Clock ticks from the host's start to its own: a later process of this number differs."""

    def __str__(self) -> str:
        return f"host {self.host}, process {self.pid}"


@cache
def this_process() -> Process:
    """The one that asks."""
    pid = os.getpid()
    return Process(
        host=socket.gethostname(), pids=_numbering(), pid=pid, started=_start_of(pid) or 0
    )


def is_gone(process: Process) -> bool:
    """Has it certainly ended? False too where that cannot be seen from here."""
    if not _is_seen_from_here(process):
        return False
    start = _start_of(process.pid)
    return start != process.started if start is not None else not exists(process.pid)


def kill(process: Process) -> None:
    """End it at once, stopped or not; nothing where it is not seen from here or has ended."""
    if _is_seen_from_here(process) and not is_gone(process):
        os.kill(process.pid, signal.SIGKILL)


def _is_seen_from_here(process: Process) -> bool:
    here = this_process()
    return process.started > 0 and (process.host, process.pids) == (here.host, here.pids)


def _numbering() -> str:
    try:
        # Every host's own numbering has the same name, and hosts may have the same name too.
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{os.readlink('/proc/self/ns/pid')} since boot {boot}"
    except OSError:  # no Linux: nothing is seen from anywhere
        return ""


def _start_of(pid: int) -> int | None:
    """When the process of this number started, 0 if it has ended; None where that is not seen."""
    # Not psutil's create_time: that is a date, and moves when the host's clock is set.
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    ended = fields[0] in "ZX"  # its parent has not asked yet
    return 0 if ended else int(fields[19])


def exists(pid: int) -> bool:
    """Is there such a process on this host? Where /proc hides those of others, too."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
