"""What workers run for ``test_watch.py`` and ``test_run_lock.py``."""

import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

from sparse_lora_dist import train as program
from sparse_lora_dist.distributed import comm
from sparse_lora_dist.errors import PeerError, UserError
from sparse_lora_dist.run_folder import lock as run_lock
from sparse_lora_dist.runtime.entry_point import FAILURE, exit_process, write_stderr
from sparse_lora_dist.training.feed import DataFeed
from sparse_lora_dist.training.job import Job
from tests.work.run import refusal, train


def write_stderr_to(folder: Path) -> None:
    """Also what threads and C write."""
    os.dup2(os.open(folder / f"stderr_{comm.rank()}", os.O_WRONLY | os.O_CREAT), 2)


def stand_here_for_good() -> None:
    time.sleep(1000)


def stop_like_sigstop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def work_for_long() -> None:
    time.sleep(6)


IDLE: dict[str, Callable[[], None]] = {
    f.__name__: f for f in (stand_here_for_good, stop_like_sigstop, work_for_long)
}


def train_idling(
    flags: list[str],
    stderr: Path,
    rank: int,
    where: str,
    how: str,
    step: int = 0,
    environment: dict[str, str] | None = None,
) -> str:
    """The main job, in which ``rank`` idles before it reads the data, or the batches of a step."""
    write_stderr_to(stderr)

    def idle_first(function: Callable[..., Any], when: Callable[..., bool]) -> Callable[..., Any]:
        def idle_then_do(*args: Any) -> Any:
            if comm.rank() == rank and when(*args):
                IDLE[how]()
            return function(*args)

        return idle_then_do

    rows = 4 * (step - 1)
    batches = idle_first(DataFeed.batches, lambda _, done, __: where == "batches" and done == rows)
    data = idle_first(program.open_feed, lambda *_: where == "data")
    with patch.object(DataFeed, "batches", batches), patch.object(program, "open_feed", data):
        try:
            return train(flags, environment)
        except PeerError as error:  # as run_program does
            write_stderr(str(error))
            exit_process(FAILURE)


def timeouts_of_groups(flags: list[str]) -> list[float]:
    """Seconds, of every group that there is after a run but the one for long waits."""
    train(flags)
    return [
        group._get_backend(torch.device("cpu")).options._timeout.total_seconds()
        for group in dist.distributed_c10d._world.pg_map
        if group is not comm._patient
    ]


def take_over(folder: Path, all_ready: Barrier, answers: Any) -> None:
    """One of many newcomers; keeps what it gets alive until all have tried."""

    def keep_alive() -> None:
        while not done.wait(0.2):
            run_lock.renew()

    for number in range(5):
        all_ready.wait()
        try:
            with run_lock.held(folder / str(number)):
                answers.put((number, "held"))
                done = threading.Event()
                alive = threading.Thread(target=keep_alive)
                alive.start()
                all_ready.wait()
                done.set()
                alive.join()
        except UserError as error:
            answers.put((number, str(error)))
            all_ready.wait()


def refusal_of_robbed(flags: list[str], lock: Path, theirs: str) -> str:
    """What the main job ends with whose lock another job has taken by its first save."""

    def save(self: Job, held_out_loss: float | None) -> None:
        if comm.rank() == 0:
            lock.write_text(theirs)
        real_save(self, held_out_loss)

    real_save = Job.save
    with patch.object(Job, "save", save):
        return refusal(flags)


def hold(folder: Path, job: str | None = None, attempt: int = 0, renewed: bool = True) -> str:
    """What the lock says while this process holds it, or why it does not; three missed heartbeats
    are three seconds. ``renewed``: the other holder lives."""
    slurm = {} if job is None else {"SLURM_JOB_ID": job, "SLURM_RESTART_COUNT": str(attempt)}
    ended = threading.Event()

    def renew() -> None:
        while not ended.wait(0.7):
            with suppress(FileNotFoundError):
                os.utime(folder / run_lock.NAME)

    other = threading.Thread(target=renew)
    try:
        with patch.dict(os.environ, slurm), patch.object(run_lock, "HEARTBEAT_S", 1.0):
            if renewed:
                other.start()
            with run_lock.held(folder):
                return (folder / run_lock.NAME).read_text()
    except UserError as error:
        return str(error)
    finally:
        ended.set()
