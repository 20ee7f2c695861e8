"""Ranks that stop, hang or die: the job ends and the others say who."""

import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from sparse_lora_dist.runtime import watchdog
from sparse_lora_dist.runtime.batches_over_ranks import in_batches
from sparse_lora_dist.system import processes
from sparse_lora_dist.training.step import held_out_totals
from tests.conftest import Ranks
from tests.distributed.test_launchers import BIN, ENGINE, KEPT, REPOSITORY, TORCHRUN, deepspeed
from tests.fixtures.tiny_run import TinyRun
from tests.ranks import RankError, RankPool
from tests.tiers import in_full

pytestmark = pytest.mark.usefixtures("processes")
IDLING = "tests.work.watch:train_idling"
ENDLESS = 100_000
NOWHERE = {"rank": 9, "where": "data", "how": "work_for_long"}
"""No rank idles."""


def heartbeat(run: Path, rank: int) -> dict[str, Any]:
    file = run / "ranks" / f"rank_{rank:05d}.json"
    return json.loads(file.read_text()) if file.exists() else {"step": -1}


def wait_for_step(run: Path, step: int, alive: Any) -> None:
    while min(heartbeat(run, rank)["step"] for rank in (0, 1)) < step:
        assert alive(), "the job ended by itself"
        time.sleep(0.1)


@contextmanager
def pool_of_two(**arguments: Any) -> Iterator[RankPool]:
    """Two ranks of their own that train, to be stopped and killed."""
    pool = RankPool(2)

    def work() -> None:
        with suppress(RankError, EOFError, OSError):
            pool.run(IDLING, **arguments)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    yield pool
    pool.close()
    thread.join()


def test_each_batch_is_progress() -> None:
    """With a base that is whole on every rank a batch enters no collective."""
    marks: list[int] = []

    def work(items: Any) -> Any:
        marks.append(watchdog._place.marks)
        return items

    assert in_batches(range(7), 2, work, name="loss") == [*range(7)]
    assert marks == [*range(marks[0], marks[0] + 4)]
    engine: Any = SimpleNamespace(evaluating=nullcontext)
    marks.clear()
    held_out_totals(engine, [None] * 3, lambda *_: (work(_), torch.ones(1))[1])  # type: ignore[list-item]
    assert marks == [*range(marks[0], marks[0] + 3)]


def exit_codes(pool: RankPool, *ranks: int) -> list[int | None]:
    for rank in ranks:
        pool.workers[rank].join(timeout=120)
    return [pool.workers[rank].exitcode for rank in ranks]


@pytest.mark.parametrize(
    ("launcher", "sick"),
    [in_full("deepspeed", 0), in_full("torchrun", 1)],  # with deepspeed rank 0 holds the store
)
def test_a_rank_that_is_stopped_ends_the_job(
    tiny: TinyRun, tmp_path: Path, launcher: str, sick: int
) -> None:
    run, screen = tmp_path / "run", tmp_path / "screen"
    command = deepspeed(2) if launcher == "deepspeed" else [*TORCHRUN, "launcher/train.py"]
    flags = tiny.flags(run, max_steps=ENDLESS, log_every=ENDLESS, collective_timeout="5s")
    environment = {name: os.environ[name] for name in KEPT if name in os.environ}
    with screen.open("w") as file:
        job = subprocess.Popen(
            [*command, *ENGINE, *flags],
            cwd=REPOSITORY,
            env=environment | {"PATH": f"{BIN}:/usr/local/bin:/usr/bin:/bin"},
            stdout=file,
            stderr=file,
        )
        wait_for_step(run, 2, lambda: job.poll() is None)
        pids = [heartbeat(run, rank)["process"]["pid"] for rank in (0, 1)]
        os.kill(pids[sick], signal.SIGSTOP)
        assert job.wait(timeout=120) != 0
    said = screen.read_text()
    assert not any(psutil.pid_exists(pid) for pid in pids)
    assert 'sparse_lora_dist/train.py", line' not in said  # no traceback of ours
    assert f"rank {1 - sick} ends: no rank made progress for 5 s (--collective_timeout)" in said
    sick_one = f"rank {sick} (host {os.uname().nodename}, process {pids[sick]})"
    assert f"{sick_one} has not answered for " in said
    # What it did last stays to be read.
    assert heartbeat(run, sick)["step"] >= 2 and not heartbeat(run, sick)["ended"]


def test_a_rank_that_hangs_is_named_and_shows_where(tiny: TinyRun, tmp_path: Path) -> None:
    flags = tiny.flags(tmp_path / "run", max_steps=9, collective_timeout="5s")
    how = {"rank": 1, "where": "batches", "how": "stand_here_for_good", "step": 3}
    with pool_of_two(flags=flags, stderr=tmp_path, **how) as pool:
        assert exit_codes(pool, 0, 1) == [1, 1]
    said, own = ((tmp_path / f"stderr_{rank}").read_text() for rank in (0, 1))
    for text in (said, own):
        named = text.partition("not as far as the others: ")[2].partition("The furthest is ")
        assert named[0].startswith("rank 1 (host ")
        assert "at step 3, reading its batches" in named[0]
        assert named[2].startswith("rank 0 (host ") and "sum_over_ranks" in named[2]
    assert "stand_here_for_good" in own and "stand_here_for_good" not in said


def test_a_rank_that_is_killed_is_named_at_once(tiny: TinyRun, tmp_path: Path) -> None:
    run = tmp_path / "run"
    flags = tiny.flags(run, max_steps=ENDLESS, log_every=ENDLESS)
    with pool_of_two(flags=flags, stderr=tmp_path, **NOWHERE) as pool:
        wait_for_step(run, 2, lambda: all(worker.is_alive() for worker in pool.workers))
        os.kill(pool.workers[1].pid or 0, signal.SIGKILL)
        assert exit_codes(pool, 0) == [1]
    said = (tmp_path / "stderr_0").read_text()
    assert f"process {pool.workers[1].pid}) is gone, last seen at step " in said
    assert heartbeat(run, 0)["ended"] and not heartbeat(run, 1)["ended"]


def test_who_stops_where_others_may_wait_for_long_is_named_too(
    tiny: TinyRun, tmp_path: Path
) -> None:
    flags = tiny.flags(tmp_path / "run", collective_timeout="5s")
    how = {"rank": 0, "where": "data", "how": "stop_like_sigstop"}
    with pool_of_two(flags=flags, stderr=tmp_path, **how) as pool:
        assert exit_codes(pool, 0, 1) == [-signal.SIGKILL, 1]
    said = (tmp_path / "stderr_1").read_text()
    assert "rank 1 ends: no rank made progress for 5 s" in said
    assert "rank 0 (host " in said and "last seen at step 0, starting" in said


@pytest.mark.usefixtures("full")
def test_long_work_and_a_job_that_is_suspended_go_on(tiny: TinyRun, tmp_path: Path) -> None:
    run = tmp_path / "run"
    flags = tiny.flags(run, max_steps=ENDLESS, stop_after=60, collective_timeout="5s")
    how = {"rank": 0, "where": "data", "how": "work_for_long"}
    with pool_of_two(flags=flags, stderr=tmp_path, **how) as pool:
        wait_for_step(run, 2, lambda: all(worker.is_alive() for worker in pool.workers))
        for sign, pause in ((signal.SIGSTOP, 6), (signal.SIGCONT, 0)):
            for worker in pool.workers:
                os.kill(worker.pid or 0, sign)
            time.sleep(pause)
        while not (run / "adapter").exists():
            assert all(worker.is_alive() for worker in pool.workers)
            time.sleep(0.1)
    assert (tmp_path / "stderr_0").read_text().count(" ends: ") == 0


def test_no_group_of_deepspeed_gives_up_before_the_watch(
    ranks: Ranks, tiny: TinyRun, tmp_path: Path
) -> None:
    work = "tests.work.watch:timeouts_of_groups"
    for timeouts in ranks(2, work, flags=tiny.flags(tmp_path, max_steps=1)):
        assert len(timeouts) >= 2 and set(timeouts) == {720.0}


def test_a_process_is_told_from_later_ones_of_its_number() -> None:
    mark = os.memfd_create(f"{processes.MARK}token")
    child = subprocess.Popen(["sleep", "1000"], pass_fds=[mark])
    here = processes.this_process()
    started = processes._start_time(child.pid)
    assert started is not None
    ours = replace(here, pid=child.pid, started=started)
    others = [
        replace(ours, host="elsewhere"),
        replace(ours, pids="pid:[1]"),
        replace(ours, started=started - 1),
    ]
    for other in others:
        processes.kill(other, "token")
    assert not processes.is_gone(ours) and child.poll() is None
    assert [processes.is_gone(other) for other in others] == [False, False, True]
    os.kill(child.pid, signal.SIGSTOP)
    processes.kill(ours, "token")
    while not processes.is_gone(ours):  # dead, though nobody has asked for its exit code
        time.sleep(0.01)
    assert child.wait() == -signal.SIGKILL
