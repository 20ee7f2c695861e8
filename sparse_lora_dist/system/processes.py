"""Identify the process that wrote a file, and find out whether it still runs.

A PID is not enough: other hosts, other containers and later processes use the same numbers.
"""

import os
import signal
import socket
from dataclasses import dataclass
from functools import cache
from pathlib import Path

MARK = "sparse_lora_dist."
_marks: list[int] = []
"""File descriptor of the mark of this process, which stays open."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Process:
    """Identity of a process that no other process on any host or in any container ever has."""

    host: str
    """Name of the host."""
    pids: str
    """Name of the PID namespace that ``pid`` belongs to, and the host's boot ID. Each container
    has a namespace of its own, and PIDs start again at each boot."""
    pid: int
    """Process ID (PID)."""
    started: int
    """Start time in clock ticks since boot, by which later processes with the same PID differ; 0 if
    it is unknown."""

    def __str__(self) -> str:
        return f"host {self.host}, process {self.pid}"


@cache
def this_process() -> Process:
    """Return the identity of the calling process."""
    pid = os.getpid()
    return Process(
        host=socket.gethostname(), pids=_pid_namespace(), pid=pid, started=_start_time(pid) or 0
    )


os.register_at_fork(after_in_child=this_process.cache_clear)


def is_gone(process: Process) -> bool:
    """Return True if the process has certainly ended.

    Returns False also for a process that cannot be seen from here: on another host, in another
    container, or from before a reboot.
    """
    if not is_seen_from_here(process):
        return False
    start = _start_time(process.pid)
    return start != process.started if start is not None else not exists(process.pid)


def mark_this_process(token: str) -> None:
    """Give this process a mark that processes of the same user can see: an open file without a name
    in any folder. It replaces an earlier mark, and ends with the process.

    Args:
        token: random text that only the processes of one run know.
    """
    if hasattr(os, "memfd_create"):  # Linux
        _marks.append(os.memfd_create(f"{MARK}{token}"))
        for earlier in _marks[:-1]:
            os.close(earlier)
        del _marks[:-1]


def kill(process: Process, token: str) -> None:
    """Send SIGKILL to a process, which ends it even if it is suspended.

    Does nothing if the process has ended, cannot be seen from here (see ``is_gone``), belongs to
    another user, or does not bear the mark ``token`` (``mark_this_process``). What names a process
    may have been written by somebody else.
    """
    if is_seen_from_here(process) and not is_gone(process) and _bears(process.pid, token):
        os.kill(process.pid, signal.SIGKILL)


def _bears(pid: int, token: str) -> bool:
    try:
        is_own = os.stat(f"/proc/{pid}").st_uid == os.getuid()
        files = [os.readlink(file.path) for file in os.scandir(f"/proc/{pid}/fd")]
    except OSError:
        return False
    return is_own and f"/memfd:{MARK}{token} (deleted)" in files


def is_seen_from_here(process: Process) -> bool:
    """Return True if the process is, or was, on this host and in this container."""
    here = this_process()
    return process.started > 0 and (process.host, process.pids) == (here.host, here.pids)


def _pid_namespace() -> str:
    try:
        # The initial PID namespace has the same name on every host, and two hosts may have the same
        # hostname; the boot ID tells them apart.
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{os.readlink('/proc/self/ns/pid')} since boot {boot}"
    except OSError:  # not Linux: no process can be identified
        return ""


def _start_time(pid: int) -> int | None:
    """Return the start time of a process in clock ticks since boot.

    Returns 0 for a zombie, and None if /proc does not show the PID.
    """
    # Not psutil's create_time: that is a date, and changes when the host's clock is set.
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    ended = fields[0] in "ZX"  # a zombie: its parent has not waited for it yet
    return 0 if ended else int(fields[19])


def exists(pid: int) -> bool:
    """Return True if this host has a process with this PID.

    Works also where /proc hides the processes of other users.
    """
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
