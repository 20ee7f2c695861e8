"""kill -9 of one rank, by a person or by the kernel: the others say which, where, when and why."""

import os
import signal
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from sparse_lora_dist.runtime.heartbeats import Heartbeat
from sparse_lora_dist.runtime.stuck_ranks import find_closed
from sparse_lora_dist.system import processes
from sparse_lora_dist.system.cgroups import oom_kills
from sparse_lora_dist.system.processes import Process, this_process

HERE = this_process()
FAR = Process(host="n2", pids="pid:[1] since boot x", pid=77, started=5)
GONE = replace(HERE, started=HERE.started - 1)


def beat(rank: int, process: Process, number: int = 3, *, ended: bool = False) -> Heartbeat:
    return Heartbeat(
        rank=rank,
        process=process,
        number=number,
        time=1e9,
        step=8,
        phase="backward",
        marks=40,
        collectives=900,
        last_collective="sum_over_ranks",
        ended=ended,
    )


OWN = beat(0, HERE, ended=True)


def closed(before: Heartbeat, now: Heartbeat, *, is_over: bool = True) -> str | None:
    verdict = find_closed({0: OWN, 1: before}, {0: OWN, 1: now}, closed=True, is_over=is_over)
    return None if verdict is None else verdict.text


def test_a_rank_on_another_host_is_named_with_its_last_step() -> None:
    said = closed(beat(1, FAR), beat(1, FAR))
    assert said is not None
    assert said.startswith("rank 1 (host n2, process 77) is gone, last seen at step 8, backward")
    assert "It left no message, so it was killed (signal 9)" in said


def test_whether_it_is_gone_is_not_said_before_it_is_clear() -> None:
    assert closed(beat(1, FAR), beat(1, FAR), is_over=False) is None
    assert closed(beat(1, FAR), beat(1, FAR, 4)) == ""  # it lives


def test_a_rank_on_this_host_is_seen_at_once() -> None:
    said = closed(beat(1, GONE), beat(1, GONE), is_over=False)
    assert said is not None and "is gone, last seen at step 8" in said


def test_a_rank_that_has_said_why_it_ends_is_not_said_to_be_killed() -> None:
    assert closed(beat(1, FAR), beat(1, FAR, 4, ended=True), is_over=False) == ""


# Control groups, as Slurm and containers make them: (file that names them, files of events).
GROUPS = {
    "version 2": (
        "0::/system.slice/slurmstepd.scope/job_7/step_0/user/task_1\n",
        {"system.slice/slurmstepd.scope/job_7/memory.events": "oom 5\noom_kill 2\n"},
    ),
    "version 1": (
        "9:cpu,cpuacct:/\n4:memory:/slurm/uid_0/job_7/step_0/task_1\n0::/init\n",
        {
            "memory/slurm/uid_0/job_7/memory.oom_control": "under_oom 0\noom_kill 0\n",
            "memory/slurm/uid_0/job_7/step_0/task_0/memory.oom_control": "oom_kill 2\n",
        },
    ),
    "container": ("0::/\n", {"memory.events": "oom_kill 2\noom_group_kill 1\n"}),
    "container that sees the host's path": (
        "0::/../../pod/x\n",
        {"memory.events": "oom_kill 2\n"},
    ),
}


@pytest.mark.parametrize(("own", "files"), GROUPS.values(), ids=GROUPS)
def test_what_the_kernel_ended_for_memory_is_counted(
    own: str, files: dict[str, str], tmp_path: Path
) -> None:
    for name, text in files.items():
        (tmp_path / "fs" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "fs" / name).write_text(text)
    (tmp_path / "own").write_text(own)
    assert oom_kills(tmp_path / "own", tmp_path / "fs") == 2


def test_a_machine_without_control_groups_counts_none(tmp_path: Path) -> None:
    assert oom_kills(tmp_path / "none", tmp_path) == 0
    (tmp_path / "own").write_text("no colon")
    assert oom_kills(tmp_path / "own", tmp_path) == 0


def test_a_process_that_bears_no_mark_of_the_run_is_not_ended(processes: None) -> None:
    """Heartbeats pass through a store that asks for no password: they may name any process."""
    from sparse_lora_dist.system.processes import kill

    mark = os.memfd_create("sparse_lora_dist.secret")
    foreign = subprocess.Popen(["sleep", "100"])
    ours = subprocess.Popen(["sleep", "100"], pass_fds=[mark])
    try:
        for process in (foreign, ours):
            started = _started(process.pid)
            kill(replace(HERE, pid=process.pid, started=started), "guessed")
        assert (foreign.poll(), ours.poll()) == (None, None)
        for process in (foreign, ours):
            kill(replace(HERE, pid=process.pid, started=_started(process.pid)), "secret")
        assert ours.wait(timeout=10) == -signal.SIGKILL and foreign.poll() is None
    finally:
        foreign.kill()
        ours.kill()
        os.close(mark)


def _started(pid: int) -> int:
    started = processes._start_time(pid)
    assert started is not None
    return started


def test_only_one_mark_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "_marks", [])
    for token in ("a", "b"):
        processes.mark_this_process(token)
    assert processes._bears(os.getpid(), "b") and not processes._bears(os.getpid(), "a")
