"""One job at a time writes a run folder: ``RUN/run.lock`` says which.

A file that is created exclusively, and whose date the holder renews. No flock: shared file systems
may not honour it.
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
MISSED = 3
"""After so many heartbeats that did not come a holder counts as dead."""
LOOK_S = 0.5
"""Between two looks at the date of another's lock."""
SETTLED_S = 1.0
"""Two jobs that take over the same lock are through with it by then."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Holder:
    """Rank 0 of the job that writes a run folder."""

    process: Process
    job: str | None
    """Slurm's number of the job. A requeued job keeps it."""
    attempt: int
    """How often Slurm has requeued it: two runs in one allocation have the same number here too."""
    since: str
    token: str
    """Unlike that of any other attempt."""

    def __str__(self) -> str:
        job = "" if self.job is None else f", Slurm job {self.job}"
        return f"{self.process}{job}, since {self.since}"


_held: tuple[Path, Holder] | None = None


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Inside, ``folder`` belongs to this job. It is made where it is not there, and removed again
    if nothing was written into it. Collective.

    Raises:
        UserError: another job holds it.
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
    """Show that the holder lives. Nothing where this process holds no lock.

    Raises:
        UserError: another job holds it now, so this one must write nothing more.
    """
    if _held is None:
        return
    check()
    os.utime(_held[0])


def check() -> None:
    """Is what this process took still its own? Asked before anything is published or removed.

    Raises:
        UserError: it is not.
    """
    if _held is None:
        return
    path, ours = _held
    now = _read(path)
    if now is None:  # a newcomer has moved it to look at it, or has yet to write into its own
        time.sleep(SETTLED_S)
        now = _read(path)
    if now is None or now.token != ours.token:
        taker = f"now held by another job ({now})" if now else "gone"
        raise UserError(
            f"{path} of this job is {taker}. It changes hands when its holder gives no sign of "
            f"life for {MISSED * HEARTBEAT_S:.0f} s, and between attempts of one Slurm job. This "
            "job ends and writes nothing more."
        )


def is_ours() -> bool:
    """Does this process hold the lock, and has nobody taken it over?"""
    try:
        now = _held and _read(_held[0])
    except OSError:
        return False
    return bool(_held and now and now.token == _held[1].token)


def is_held(folder: Path) -> bool:
    """Does a job show life in ``folder``? For who only looks: it writes no probe, so that a clock
    of this host that is far from the file system's misleads it."""
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
    """False where there is one."""
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
            f"{holder or 'one that is just starting'}; it is alive. "
            "Wait for it, end it, or choose another --output_dir."
        )
    # Another newcomer may have judged the same lock and be a step ahead: what is moved away may be
    # its fresh one, and then goes back.
    moved = path.with_name(f".{NAME}.{ours.token}")
    with suppress(FileNotFoundError):
        path.rename(moved)
        if _read(moved) == holder:
            moved.unlink()
        else:
            moved.rename(path)


def _shows_life(path: Path, age: float) -> bool:
    """Is it renewed before it counts as dead? A job that was killed leaves a lock of a moment ago,
    and one that was to follow it must not fail of that."""
    left_s = MISSED * HEARTBEAT_S - age
    print_line(
        "waiting", f"up to {left_s:.0f} s, for a sign of life from the job that holds {path}"
    )
    try:
        seen = path.stat().st_mtime
        for _ in range(math.ceil(left_s / LOOK_S) + 1):
            time.sleep(LOOK_S)
            if path.stat().st_mtime != seen:
                return True
    except FileNotFoundError:  # its job has ended well
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
    """None where there is none, or none that can be read yet."""
    try:
        said: Mapping[str, object] = json.loads(path.read_text())
        process = Process(**said["process"])  # type: ignore[arg-type]
        return Holder(**{**said, "process": process})  # type: ignore[arg-type]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def _age(path: Path, token: str) -> float:
    """Seconds since the last heartbeat, by the clock of the file system: hosts' own differ."""
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
