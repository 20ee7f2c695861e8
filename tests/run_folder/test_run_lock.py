"""One job at a time writes a run folder."""

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from sparse_lora_dist.errors import HeldError
from sparse_lora_dist.run_folder import lock as run_lock
from sparse_lora_dist.run_folder.metrics_file import JsonLines
from sparse_lora_dist.runtime.entry_point import HELD
from tests.conftest import Ranks
from tests.fixtures.tiny_run import TinyRun
from tests.ranks import CONTEXT
from tests.runtime.test_watch import ENDLESS, NOWHERE, exit_codes, pool_of_two, wait_for_step
from tests.work.watch import take_over

pytestmark = pytest.mark.usefixtures("processes")
TRAIN, REFUSAL, HOLD = "tests.work.run:train", "tests.work.run:refusal", "tests.work.watch:hold"


def everything_in(run: Path) -> list[str]:
    return sorted(str(path.relative_to(run)) for path in run.rglob("*"))


def test_two_jobs_in_one_folder(ranks: Ranks, tiny: TinyRun, tmp_path: Path) -> None:
    run = tmp_path / "run"
    first = tiny.flags(run, max_steps=ENDLESS, log_every=ENDLESS)
    with pool_of_two(flags=first, stderr=tmp_path, **NOWHERE) as pool:
        wait_for_step(run, 2, lambda: all(worker.is_alive() for worker in pool.workers))
        # What the second would take for left over.
        torn = run / "checkpoints" / ".tmp_step_00000009"
        torn.mkdir(parents=True)
        for said in ranks(2, REFUSAL, flags=tiny.flags(run, resume="auto")):
            assert f"{run} is being written by another job: host {os.uname().nodename}" in said
            assert f"process {pool.workers[0].pid}, since 20" in said
            assert "another --output_dir" in said
        assert torn.exists()
        for worker in pool.workers:
            assert worker.is_alive()
            os.kill(worker.pid or 0, signal.SIGKILL)
        exit_codes(pool, 0, 1)
        assert (run / "run.lock").exists()
        told, _ = ranks(2, TRAIN, flags=tiny.flags(run, resume="auto"))
    assert "trained" in told and (run / "adapter").exists()
    assert not torn.exists()
    assert not {"run.lock", "ranks"} & {path.name for path in run.iterdir()}


@pytest.mark.usefixtures("full")
def test_a_later_attempt_of_a_slurm_job_takes_over_and_the_former_ends(
    ranks: Ranks, tiny: TinyRun, tmp_path: Path
) -> None:
    run, job = tmp_path / "run", {"SLURM_JOB_ID": "77"}
    requeued = job | {"SLURM_RESTART_COUNT": "1"}
    first = tiny.flags(run, max_steps=ENDLESS, log_every=ENDLESS)
    with pool_of_two(flags=first, environment=job, stderr=tmp_path, **NOWHERE) as pool:
        wait_for_step(run, 2, lambda: all(worker.is_alive() for worker in pool.workers))
        assert json.loads((run / "run.lock").read_text())["job"] == "77"
        ranks(2, TRAIN, flags=tiny.flags(run, resume="auto"), environment=requeued)
        assert exit_codes(pool, 0) == [HELD]
    said = (tmp_path / "stderr_0").read_text()
    assert "This job ends and writes nothing more" in said
    assert (run / "adapter").exists()


def of_another_host(job: str | None = None) -> str:
    process = {"host": "elsewhere", "pids": "pid:[1]", "pid": 4242, "started": 9}
    holder = {"process": process, "job": job, "attempt": 0, "since": "then"}
    holder["token"] = "theirs"
    return json.dumps(holder)


def test_who_lost_the_folder_publishes_nothing(ranks: Ranks, tiny: TinyRun, tmp_path: Path) -> None:
    work, theirs = "tests.work.watch:refusal_of_robbed", of_another_host()
    lock, flags = tmp_path / "run.lock", tiny.flags(tmp_path, save_every=2)
    for said in ranks(2, work, flags=flags, lock=lock, theirs=theirs):
        assert "now held by another job (host elsewhere, process 4242" in said
    assert not (tmp_path / "checkpoints").exists()
    # These may be the other job's.
    assert lock.read_text() == theirs and (tmp_path / "ranks").exists()


def test_who_lost_the_folder_appends_no_record(tmp_path: Path) -> None:
    """A job that stood still for long wakes in the middle of a step."""
    with run_lock.held(tmp_path):
        lines = JsonLines(tmp_path / "metrics.jsonl", last_step=None)
        lines.append({"step": 1})
        (tmp_path / run_lock.NAME).write_text(of_another_host())
        with pytest.raises(HeldError, match="writes nothing more"):
            lines.append({"step": 2})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n'


def lock_of_another_host(folder: Path, *, age_s: float, job: str | None = None) -> None:
    folder.mkdir(exist_ok=True)
    lock = folder / run_lock.NAME
    lock.write_text(of_another_host(job))
    then = time.time() - age_s
    os.utime(lock, (then, then))


TAKEN, REFUSED = True, False


@pytest.mark.parametrize(
    ("their_job", "our_job", "attempt", "age_s", "renewed", "is_taken"),
    [
        (None, None, 0, 1, True, REFUSED),
        ("1", "2", 0, 1, True, REFUSED),
        ("1", "1", 0, 1, True, REFUSED),  # two runs in one allocation
        ("1", "1", 1, 1, True, TAKEN),
        ("1", "2", 0, 4, False, TAKEN),
        (None, "1", 0, 1, False, TAKEN),  # of a job that was killed a moment ago
    ],
)
def test_a_lock_of_another_host(
    ranks: Ranks,
    tmp_path: Path,
    their_job: str | None,
    our_job: str | None,
    attempt: int,
    age_s: float,
    renewed: bool,
    is_taken: bool,
) -> None:
    lock_of_another_host(tmp_path, age_s=age_s, job=their_job)
    (said,) = ranks(1, HOLD, folder=tmp_path, job=our_job, attempt=attempt, renewed=renewed)
    if is_taken:
        assert json.loads(said)["process"]["host"] == os.uname().nodename
        assert everything_in(tmp_path) == []
    else:
        assert "host elsewhere, process 4242" in said and "is alive" in said
        assert everything_in(tmp_path) == ["run.lock"]
        assert json.loads((tmp_path / "run.lock").read_text())["token"] == "theirs"


@pytest.mark.parametrize(("age_s", "is_taken"), [(1, False), (40, True)])
def test_a_lock_whose_holder_cannot_be_read(
    ranks: Ranks, tmp_path: Path, age_s: float, is_taken: bool
) -> None:
    """Created, and not yet written; or its job died in between."""
    lock = tmp_path / "run.lock"
    lock.touch()
    then = time.time() - age_s
    os.utime(lock, (then, then))
    (said,) = ranks(1, HOLD, folder=tmp_path)
    assert ("one that is just starting" in said) == (not is_taken)


def test_of_many_newcomers_one_takes_a_dead_lock(tmp_path: Path) -> None:
    rounds, newcomers = 5, 4
    for number in range(rounds):
        lock_of_another_host(tmp_path / str(number), age_s=60)
    answers: Any = CONTEXT.Queue()
    arguments = (tmp_path, CONTEXT.Barrier(newcomers), answers)
    crew = [CONTEXT.Process(target=take_over, args=arguments) for _ in range(newcomers)]
    for one in crew:
        one.start()
    said = [answers.get(timeout=60) for _ in range(rounds * newcomers)]
    for one in crew:
        one.join()
    for number in range(rounds):
        of_round = [text for n, text in said if n == number]
        assert of_round.count("held") == 1, of_round
