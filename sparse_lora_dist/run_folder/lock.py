"""Lock a run folder: only the job that holds ``RUN/run.lock`` writes into it.

The lock is a file that is created exclusively (mode "x"). Its holder renews it every 10 s by
setting its modification time. Another job takes it over when the holder's process is gone, when it
was not renewed for 30 s, or when Slurm has requeued the holder's job. flock is not used, because
some shared file systems do not honour it.
"""

import json
import math
import os
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

from sparse_lora_dist.distributed import comm
from sparse_lora_dist.distributed.console import print_line
from sparse_lora_dist.distributed.phases import fail_together
from sparse_lora_dist.errors import UserError
from sparse_lora_dist.system.processes import Process, is_gone, this_process

NAME = "run.lock"
HEARTBEAT_S = 10.0
"""Seconds between two renewals of the lock."""
MISSED = 3
"""Number of renewals in a row after whose absence the holder counts as dead."""
LOOK_S = 0.5
"""Seconds between two readings of the modification time of another job's lock."""
SETTLED_S = 1.0
"""Seconds after which two jobs that take over the same lock have both finished."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Holder:
    """Content of the lock file: who holds the lock."""

    process: Process
    """Process of the job's rank 0."""
    job: str | None
    """Slurm's job id, which a requeued job keeps; None without Slurm."""
    attempt: int
    """Number of times that Slurm has requeued the job. Two runs in one allocation have the same
    number."""
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

    A folder that does not exist is made, and removed on exit if nothing was written into it.

    Args:
        folder: the run folder.

    Raises:
        UserError: another job holds the lock.
    """
    made = not folder.exists()
    try:
        with fail_together(f"locking {folder}"):
            if comm.rank() == 0:
                folder.mkdir(parents=True, exist_ok=True)
                _take(folder / NAME)
        yield
    finally:
        if comm.rank() == 0:
            _release()
            if made:
                with suppress(OSError):  # not empty, as after every run
                    folder.rmdir()


def renew() -> None:
    """Renew the lock, if this process holds one. Not a collective.

    Raises:
        UserError: another job holds it now, so this one must write nothing more.
    """
    if _held is None:
        return
    check()
    os.utime(_held[0])


def check() -> None:
    """Raise UserError if this process has lost the lock that it took. Not a collective.

    Call it before publishing or removing files of the run folder. It does nothing in a process that
    took no lock.

    Raises:
        UserError: another job has taken the lock over, or the lock file is gone.
    """
    if _held is None:
        return
    path, ours = _held
    now = _read(path)
    if now is None:  # another job has moved it to read it, or has not yet written its own
        time.sleep(SETTLED_S)
        now = _read(path)
    if now is None or now.token != ours.token:
        taker = f"now held by another job ({now})" if now else "gone"
        raise UserError(
            f"The lock {path} of this job is {taker}. Another job may take it over when it was not "
            f"renewed for {MISSED * HEARTBEAT_S:.0f} s, or when Slurm requeues the job. This job "
            "ends and writes nothing more. Start one job at a time in a run folder."
        )


def is_ours() -> bool:
    """Return True if this process took the lock and no other job has taken it over."""
    try:
        now = _held and _read(_held[0])
    except OSError:
        return False
    return bool(_held and now and now.token == _held[1].token)


def is_held(folder: Path) -> bool:
    """Return True if a live job holds the lock of ``folder``. For programs that only read it.

    The age of the lock is measured by this host's clock, since reading the file system's clock
    takes a write. The result is wrong if the two clocks are many seconds apart.
    """
    try:
        holder, age = _read(folder / NAME), time.time() - (folder / NAME).stat().st_mtime
    except OSError:
        return False
    return holder is not None and not is_gone(holder.process) and age < MISSED * HEARTBEAT_S


def _take(path: Path) -> None:
    global _held
    ours = Holder(
        process=this_process(),
        job=os.environ.get("SLURM_JOB_ID"),
        attempt=int(os.environ.get("SLURM_RESTART_COUNT", "0")),
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


def _create(path: Path, holder: Holder) -> bool:
    """Create the lock file. Return False if there is one already."""
    try:
        file = path.open("x")
    except FileExistsError:
        return False
    with file:
        json.dump(asdict(holder), file)
        file.flush()
        os.fsync(file.fileno())
    return True


def _remove_if_stale(path: Path, ours: Holder) -> None:
    try:
        holder, age = _read(path), _age(path, ours.token)
    except FileNotFoundError:
        return
    if not _may_take_over(holder, age, ours) and _shows_life(path, age):
        raise UserError(
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
    """Wait until the lock is renewed (return True), or stale or gone (return False).

    A job that was killed a moment ago leaves a lock that is not stale yet. The next job waits here
    until it is stale, instead of failing.

    Args:
        path: the lock file of another job.
        age: seconds since it was renewed.
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
        fields: Mapping[str, object] = json.loads(path.read_text())
        process = Process(**fields["process"])  # type: ignore[arg-type]
        return Holder(**{**fields, "process": process})  # type: ignore[arg-type]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def _age(path: Path, token: str) -> float:
    """Return the seconds since the lock ``path`` was renewed. They are measured by the clock of the
    file system, since the clocks of hosts differ; ``token`` names the file made for it."""
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
