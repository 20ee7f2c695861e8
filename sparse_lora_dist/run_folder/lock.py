"""Lock a run folder, so that only one job (one start of the program) writes into it at a time.

The lock is the file ``run.lock`` in the run folder, created exclusively. The job that created it,
its holder, renews it every 10 s by setting its modification time. Another job may take
the lock over when the holder's process is gone, when the lock was not renewed for 30 s, or when
Slurm has requeued the holder's job. flock is not used, because some shared file systems do not
honour it.
"""

import json
import math
import os
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from datetime import datetime
from pathlib import Path

from sparse_lora_dist.distributed import comm
from sparse_lora_dist.distributed.console import print_line
from sparse_lora_dist.distributed.launch_slurm import restart_count
from sparse_lora_dist.distributed.phases import fail_together
from sparse_lora_dist.errors import HeldError, UserError
from sparse_lora_dist.system.atomic_files import write_new
from sparse_lora_dist.system.processes import Process, is_gone, this_process

NAME = "run.lock"
START = b'{"process":'
"""First bytes of a lock file."""
HEARTBEAT_S = 10.0
"""Seconds between two renewals of the lock."""
MISSED = 3
"""Number of missed renewals in a row after which the holder counts as dead."""
LOOK_S = 0.5
"""Seconds between two readings of the modification time of another job's lock, while waiting to see
whether that job renews it."""
SETTLED_S = 1.0
"""Seconds to wait after taking over a lock before checking that it was not lost again. If two jobs
take over the same lock at once, both have finished by then."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Holder:
    """Content of the lock file: which job holds the lock."""

    process: Process
    """Process of the job's rank 0."""
    job: str | None
    """Slurm's job id, which a requeued job keeps; None without Slurm."""
    attempt: int
    """Number of times that Slurm has requeued the job; 0 without Slurm. Two runs in one Slurm
    allocation have the same job id and the same number, so neither takes the other's lock."""
    since: str
    """Time at which the lock was taken, ISO 8601."""
    token: str
    """Random id, which differs for each process that takes the lock."""

    def __str__(self) -> str:
        job = "" if self.job is None else f", Slurm job {self.job}"
        return f"{self.process}{job}, since {self.since}"


_held: tuple[Path, Holder] | None = None


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Context manager: take the lock of a run folder, and release it on exit. Collective.

    Only rank 0 takes the lock; the other ranks wait until it has. A folder that does not exist is
    made, and removed on exit if nothing was written into it.

    Args:
        folder: the run folder.

    Raises:
        HeldError: another job holds the lock and is alive; on every rank.
    """
    made = not folder.exists()
    try:
        with fail_together(f"locking {folder}", may_pass=True):
            if comm.rank() == 0:
                folder.mkdir(parents=True, exist_ok=True)
                _take(folder / NAME)
        yield
    finally:
        if comm.rank() == 0 and not _is_of_parent():
            _release()
            if made:
                with suppress(OSError):  # not empty, as after every run
                    folder.rmdir()


def renew() -> None:
    """Renew the lock, if this process took one. Called every few seconds by a thread of the
    watchdog. Not a collective.

    Raises:
        HeldError: another job holds the lock now, so this job must write nothing more.
        OSError: the file system failed.
    """
    if _held is None:
        return
    check()
    os.utime(_held[0])


def check() -> None:
    """Raise HeldError if this process has lost the lock that it took. Not a collective.

    Call it before publishing or removing files of the run folder. It does nothing in a process that
    took no lock.

    Raises:
        HeldError: another job has taken the lock over, the lock file is gone, or this process is a
            fork of the one that took the lock.
    """
    if _held is None:
        return
    if _is_of_parent():
        raise HeldError(
            "This process was forked from that of the run, which alone writes into its folder. End "
            "it inside the block of training(), with os._exit(0)."
        )
    path, ours = _held
    now = _read(path)
    if now is None:  # another job has moved it to read it, or has not yet written its own
        time.sleep(SETTLED_S)
        now = _read(path)
    if now is None or now.token != ours.token:
        taker = f"now held by another job ({now})" if now else "gone"
        raise HeldError(
            f"This job has lost its lock: {path} is {taker}. Another job may take over a lock that "
            f"was not renewed for {MISSED * HEARTBEAT_S:.0f} s, or when Slurm requeues the job. "
            "This job ends and writes nothing more. Start one job at a time in a run folder."
        )


def _is_of_parent() -> bool:
    """Return True if the process that this one was forked from has taken the lock."""
    return _held is not None and _held[1].process.pid != os.getpid()


def is_ours() -> bool:
    """Return True if this process took the lock and no other job has taken it over."""
    if _is_of_parent():
        return False
    try:
        now = _held and _read(_held[0])
    except OSError:
        return False
    return bool(_held and now and now.token == _held[1].token)


def own_token() -> str:
    """Return the random text in the lock that this process took; "" if it took none."""
    return _held[1].token if _held else ""


def token_in(folder: Path) -> str | None:
    """Return the random text in the lock of ``folder``; None if there is no lock.

    Raises:
        OSError: the folder cannot be read.
    """
    holder = _read(folder / NAME)
    return None if holder is None else holder.token


def is_held(folder: Path) -> bool:
    """Return True if a live job holds the lock of ``folder``. For programs that only read it.

    The time since its last renewal is measured with this host's clock, since reading the file
    server's clock would take a write. The result is wrong if the two clocks are many seconds apart.
    """
    try:
        holder, age = _read(folder / NAME), time.time() - (folder / NAME).stat().st_mtime
    except OSError:
        return False
    return holder is not None and not is_gone(holder.process) and age < MISSED * HEARTBEAT_S


def _take(path: Path) -> None:
    global _held
    _check_form(path)
    ours = Holder(
        process=this_process(),
        job=os.environ.get("SLURM_JOB_ID"),
        attempt=restart_count(os.environ),
        since=datetime.now().astimezone().isoformat(timespec="seconds"),
        token=uuid.uuid4().hex,
    )
    contested = False
    while not _create(path, ours):
        _remove_if_stale(path, ours)
        contested = True
    _held = path, ours
    if contested:
        time.sleep(SETTLED_S)
        check()


def _check_form(path: Path) -> None:
    """Raise UserError if there is something under the name of the lock that no job has made."""
    if not os.path.lexists(path):
        return
    if path.is_symlink():
        what = "a symbolic link"
    elif not path.is_file():
        what = "no file"
    elif _has_other_content(path):
        what = "a file that this program has not written"
    else:
        return
    raise UserError(
        f"{path} is {what}, but the program needs this name for its lock. Move it away, or choose "
        "another --output_dir."
    )


def _has_other_content(path: Path) -> bool:
    """Return True if a file is neither a lock nor the first part of one. Versions that did not link
    a complete file wrote part of a lock if they were killed."""
    try:
        with path.open("rb") as file:
            start = file.read(len(START))
    except OSError:  # released meanwhile
        return False
    return not START.startswith(start)


def is_lock(path: Path) -> bool:
    """Return True if a file is the lock of a job, whether the job is alive or not."""
    return not path.is_symlink() and path.is_file() and _read(path) is not None


def _create(path: Path, holder: Holder) -> bool:
    """Create the lock file ``path`` with the content ``holder``. Return False if it exists."""
    try:
        write_new(path, json.dumps(asdict(holder)))
    except FileExistsError:
        return False
    return True


def _remove_if_stale(path: Path, ours: Holder) -> None:
    try:
        holder, age = _read(path), _age(path, ours.token)
    except FileNotFoundError:
        return
    if not _may_take_over(holder, age, ours) and _shows_life(path, age):
        raise HeldError(
            f"{path.parent} is being written by another job: "
            f"{holder or 'one that is just starting'}. That job is alive. "
            "Wait for it, end it, or choose another --output_dir."
        )
    # A third job may have removed the same stale lock and created its own already. So the file is
    # moved first and read again: if it is another job's new lock, it is moved back.
    moved = path.with_name(f".{NAME}.{ours.token}")
    with suppress(FileNotFoundError):
        path.rename(moved)
        if _read(moved) == holder:
            moved.unlink()
        else:
            moved.rename(path)


def _shows_life(path: Path, age: float) -> bool:
    """Wait to see whether the job that holds a lock is alive.

    A job that was killed a moment ago leaves a lock whose last renewal is not yet 30 s old. The
    next job waits here until it is, instead of failing.

    Args:
        path: the lock file of another job.
        age: seconds since it was renewed.

    Returns:
        True as soon as the lock is renewed; False if it is released, or was not renewed for 30 s.
    """
    left_s = MISSED * HEARTBEAT_S - age
    print_line(
        "waiting", f"up to {left_s:.0f} s, to see whether the job that holds {path} is alive"
    )
    try:
        seen = path.stat().st_mtime
        for _ in range(math.ceil(left_s / LOOK_S) + 1):
            time.sleep(LOOK_S)
            if path.stat().st_mtime != seen:
                return True
    except FileNotFoundError:  # its job has released it
        pass
    return False


def _may_take_over(holder: Holder | None, age: float, ours: Holder) -> bool:
    if age > MISSED * HEARTBEAT_S:
        return True
    if holder is None:  # created, not yet written
        return False
    is_requeued = holder.job is not None and holder.job == ours.job
    return is_gone(holder.process) or (is_requeued and holder.attempt < ours.attempt)


def _read(path: Path) -> Holder | None:
    """Return the holder that a lock file names; None if there is no file or it is still empty."""
    try:
        found: Mapping[str, object] = json.loads(path.read_text())
        process = Process(**found["process"])  # type: ignore[arg-type]
        holder = Holder(**{**found, "process": process})  # type: ignore[arg-type]
    except (FileNotFoundError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return holder if _has_types(holder) and _has_types(process) else None


def _has_types(record: Holder | Process) -> bool:
    """Return True if the values that were read have the types of the fields."""
    texts, numbers = ("host", "pids", "since", "token"), ("pid", "started", "attempt")
    return all(
        isinstance(value, str) if name in texts else type(value) is int if name in numbers else True
        for name, value in ((f.name, getattr(record, f.name)) for f in fields(record))
    )


def _age(path: Path, token: str) -> float:
    """Return the seconds since a lock was renewed, by the clock of the file system.

    The clocks of hosts differ, so a probe file is written beside the lock, and the two modification
    times are compared.

    Args:
        path: the lock file.
        token: random id of the caller, which becomes part of the name of the probe file.
    """
    probe = path.with_name(f".{NAME}.probe.{token}")
    probe.touch()
    os.utime(probe)
    now = probe.stat().st_mtime
    probe.unlink()
    return max(0.0, now - path.stat().st_mtime)


def _release() -> None:
    global _held
    if _held is not None and is_ours():
        with suppress(OSError):
            _held[0].unlink()
    _held = None
