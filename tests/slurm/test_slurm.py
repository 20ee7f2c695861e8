"""The scripts of slurm/ on a real Slurm of two nodes: whatever interrupts a run, it ends with the
bytes of an undisturbed one."""

import os
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from sparse_lora_dist.run_folder.metrics_file import read_records
from tests.fixtures.tiny_run import TinyRun
from tests.slurm.cluster import REPOSITORY, Cluster, running_cluster, why_not

pytestmark = [pytest.mark.usefixtures("processes"), pytest.mark.timeout(1800)]

BIN = Path(sys.executable).parent
KEPT = ("HOME", "LANG", "TMPDIR", "LD_LIBRARY_PATH")
TWO_RANKS = "--nodes=2 --ntasks-per-node=1 --gpus-per-node=1 --cpus-per-task=1".split()
LAST_STEP = 80


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    if reason := why_not():
        pytest.skip(reason)
    kept = {name: os.environ[name] for name in KEPT if name in os.environ}
    # Its nodes' names are found in no DNS.
    ours = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"}
    with running_cluster(**kept, **ours) as started:
        started.environment["PATH"] = f"{BIN}:{started.environment['PATH']}"
        yield started


@dataclass(frozen=True)
class Submitted:
    """A job that trains into ``folder``."""

    cluster: Cluster
    number: str
    folder: Path

    @property
    def log(self) -> str:
        path = self.cluster.folder / f"job-{self.number}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    @property
    def last_step(self) -> int:
        path = self.folder / "metrics.jsonl"
        # The file is there a moment before its first row.
        rows = read_records(path) if path.exists() else []
        return int(rows[-1]["step"]) if rows else 0

    @property
    def state(self) -> str:
        return self.cluster.job(self.number)["JobState"]

    def wait_for(self, text: str, attempt: int) -> None:
        start = f"attempt {attempt}, on"
        self.cluster.wait(lambda: text in self.log.partition(start)[2])

    def hold(self, beyond: int) -> None:
        """Stop rank 1, in some step after ``beyond``: nothing depends on how fast this machine
        is."""
        self.cluster.wait(lambda: self.last_step > beyond)
        rank = self.cluster.rank(self.number, 1)
        assert rank is not None, self.log
        rank.suspend()

    def signal_early(self, name: str) -> None:
        """To all ranks, while they import torch: before they listen to signals."""
        ranks = (0, 1)
        self.cluster.wait(lambda: None not in [self.cluster.rank(self.number, r) for r in ranks])
        self.cluster.command("scancel", f"--signal={name}", self.number)

    def let_go(self) -> None:
        # Slurm lets all go itself at a time limit, and may have been first.
        if rank := self.cluster.rank(self.number, 1):
            rank.resume()

    def end(self) -> None:
        self.cluster.wait(lambda: self.state not in ("PENDING", "RUNNING", "COMPLETING"))

    def check_finished(self) -> bytes:
        """The adapter."""
        self.end()
        assert self.state == "COMPLETED", self.log
        assert self.log.splitlines()[-1] == "slurm     finished"
        assert self.last_step == LAST_STEP
        return (self.folder / "adapter" / "adapter_model.safetensors").read_bytes()


def submit(
    cluster: Cluster,
    tiny: TinyRun,
    folder: Path,
    script: str = "slurm/train.sbatch",
    options: list[str] = TWO_RANKS,
    **variables: str,
) -> Submitted:
    flags = tiny.flags(folder, max_steps=LAST_STEP, save_every=5)
    output = f"--output={cluster.folder}/job-%j.log"
    words = ["sbatch", "--parsable", output, *options, script, *flags]
    return Submitted(cluster, cluster.command(*words, **variables).strip(), folder)


def edited(folder: Path, lines: dict[str, str]) -> str:
    """train.sbatch with other #SBATCH lines, as a person fits it to a site."""
    text = (REPOSITORY / "slurm" / "train.sbatch").read_text()
    for theirs, ours in lines.items():
        assert text.count(f"#SBATCH {theirs}\n") == 1
        text = text.replace(theirs, ours)
    (folder / "train.sbatch").write_text(text)
    return str(folder / "train.sbatch")


@pytest.fixture(scope="module")
def limited(
    cluster: Cluster, tiny: TinyRun, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Future[Submitted]]:
    """A run that is longer than its time limit, beside the others: Slurm counts in minutes."""
    folder = tmp_path_factory.mktemp("limited")
    lines = {"--time=24:00:00": "--time=1", "--signal=USR1@300": "--signal=USR1@1"}
    script = edited(folder, lines)

    def run() -> Submitted:
        job = submit(cluster, tiny, folder / "run", script)
        job.hold(beyond=0)
        job.wait_for("SIGUSR1: the run saves", attempt=1)
        job.let_go()
        job.end()
        return job

    pool = ThreadPoolExecutor()
    yield pool.submit(run)
    pool.shutdown(wait=False)  # the cluster's end is also the end of an interrupted wait


@pytest.fixture(scope="module")
def undisturbed(
    cluster: Cluster,
    limited: Future[Submitted],
    tiny: TinyRun,
    tmp_path_factory: pytest.TempPathFactory,
) -> Submitted:
    job = submit(cluster, tiny, tmp_path_factory.mktemp("undisturbed") / "run")
    job.end()
    return job


def test_a_run_over_two_nodes_finishes(undisturbed: Submitted) -> None:
    assert undisturbed.check_finished()
    assert f"job {undisturbed.number}, attempt 1, on n[1-2]" in undisturbed.log
    assert "srun: 2 ranks on 2 nodes" in undisturbed.log


@pytest.mark.usefixtures("full")
def test_interrupted_in_every_way_it_ends_the_same(
    cluster: Cluster, undisturbed: Submitted, tiny: TinyRun, tmp_path: Path
) -> None:
    job = submit(cluster, tiny, tmp_path / "run")

    job.signal_early("USR1")
    job.wait_for("a signal came before the program listened; requeues", attempt=1)

    job.hold(beyond=0)
    cluster.command("scancel", "--signal=USR1", job.number)
    job.wait_for("SIGUSR1: the run saves", attempt=2)
    job.let_go()
    job.wait_for("stopped for now, as the lines above say; requeues", attempt=2)

    # Held, it cannot save in the seconds that Slurm leaves it.
    job.hold(beyond=job.last_step)
    cluster.command("scontrol", "requeue", job.number)
    job.wait_for(" ", attempt=4)
    assert "DUE TO JOB REQUEUE" in job.log

    job.hold(beyond=job.last_step)
    cluster.kill_node("n2")
    job.wait_for("not every node answers; requeues", attempt=4)
    cluster.start_node("n2")

    assert job.check_finished() == undisturbed.check_finished()
    assert "resumes" in job.log.partition("attempt 5, on")[2]


@pytest.mark.usefixtures("full")
def test_an_export_is_a_job_of_its_own(
    cluster: Cluster, undisturbed: Submitted, tmp_path: Path
) -> None:
    adapter, output = undisturbed.check_finished(), f"--output={cluster.folder}/export-%j.log"
    usual = ("sbatch", "--parsable", output, "--mem=0", "--cpus-per-task=1", "slurm/export.sbatch")
    words = (str(undisturbed.folder), "--output", str(tmp_path / "out"))
    number = cluster.command(*usual, *words).strip()
    cluster.wait(lambda: cluster.job(number)["JobState"] in ("COMPLETED", "FAILED"))
    log = (cluster.folder / f"export-{number}.log").read_text()
    assert cluster.job(number)["JobState"] == "COMPLETED", log
    assert "written" in log
    assert (tmp_path / "out" / "adapter_model.safetensors").read_bytes() == adapter


@pytest.mark.usefixtures("full")
def test_requeues_come_to_an_end(cluster: Cluster, tiny: TinyRun, tmp_path: Path) -> None:
    job = submit(cluster, tiny, tmp_path / "run", MAX_REQUEUES="0")
    job.signal_early("TERM")
    job.end()
    assert "not requeued again: that was done 0 times" in job.log
    assert (job.state, cluster.job(job.number)["ExitCode"]) == ("FAILED", "143:0")


@pytest.mark.usefixtures("full")
def test_a_failure_of_the_program_is_not_tried_again(
    cluster: Cluster, tiny: TinyRun, tmp_path: Path
) -> None:
    script = edited(tmp_path, {"--gpus-per-node=8": "--gpus-per-task=1"})
    options = ["--ntasks-per-node=2", "--cpus-per-task=1"]
    job = submit(cluster, tiny, tmp_path / "run", script, options, DS_ACCELERATOR="none")
    job.end()
    assert (job.state, cluster.job(job.number)["ExitCode"]) == ("FAILED", "2:0"), job.log
    assert "DS_ACCELERATOR must be one of" in job.log
    assert job.log.splitlines()[-1].startswith("slurm     status 2: trying again would not")


@pytest.mark.usefixtures("full")
def test_a_rank_that_is_killed_is_named_and_its_job_is_not_requeued(
    cluster: Cluster, tiny: TinyRun, tmp_path: Path
) -> None:
    job = submit(cluster, tiny, tmp_path / "run")
    job.hold(beyond=0)
    killed = cluster.rank(job.number, 1)
    assert killed is not None
    killed.kill()
    job.end()
    assert (job.state, cluster.job(job.number)["ExitCode"]) == ("FAILED", "137:0"), job.log
    assert f"process {killed.pid}) is gone, last seen at step " in job.log
    assert "slurm     status 137: a rank was killed (signal 9)" in job.log


@pytest.mark.usefixtures("full")
def test_a_folder_that_another_job_writes_has_a_status_of_its_own(
    cluster: Cluster, tiny: TinyRun, tmp_path: Path
) -> None:
    first = submit(cluster, tiny, tmp_path / "run")
    first.hold(beyond=0)
    second = submit(cluster, tiny, tmp_path / "run")
    second.end()
    assert (second.state, cluster.job(second.number)["ExitCode"]) == ("FAILED", "73:0"), second.log
    assert f"Slurm job {first.number}, since" in second.log
    assert "slurm     status 73: another job writes the run folder" in second.log
    first.let_go()
    first.check_finished()


@pytest.mark.usefixtures("full")
def test_a_script_that_forgets_srun_is_told_so(
    cluster: Cluster, tiny: TinyRun, tmp_path: Path
) -> None:
    script = tmp_path / "own.sbatch"
    script.write_text(f'#!/bin/bash\npython {REPOSITORY}/launcher/train.py "$@"\n')
    flags = tiny.flags(tmp_path / "run", max_steps=1)
    output = f"--output={cluster.folder}/own.log"
    number = cluster.command("sbatch", "--parsable", output, *TWO_RANKS, str(script), *flags)
    cluster.wait(lambda: cluster.job(number.strip())["JobState"] in ("COMPLETED", "FAILED"))
    log = (cluster.folder / "own.log").read_text()
    assert "warning   this job has 2 tasks (SLURM_NTASKS=2), but the program was started " in log
    assert "srun python" in log and " on 1 rank" in log


@pytest.mark.usefixtures("full")
def test_an_evaluation_runs_over_two_nodes(
    cluster: Cluster, undisturbed: Submitted, tiny: TinyRun, tmp_path: Path
) -> None:
    words = ["--model", str(tiny.model), "--adapter", str(undisturbed.folder)]
    words += ["--eval_data", str(tiny.held_out), "--metrics", "loss", "--precision", "fp32"]
    words += ["--sequence_length", "64", "--output", str(tmp_path / "result.json")]
    output = f"--output={cluster.folder}/eval.log"
    command = ["sbatch", "--parsable", output, *TWO_RANKS, "slurm/eval.sbatch", *words]
    number = cluster.command(*command).strip()
    cluster.wait(lambda: cluster.job(number)["JobState"] in ("COMPLETED", "FAILED"))
    log = (cluster.folder / "eval.log").read_text()
    assert cluster.job(number)["JobState"] == "COMPLETED", log
    assert "srun: 2 ranks on 2 nodes" in log and (tmp_path / "result.json").exists()


@pytest.mark.usefixtures("full")
def test_a_sweep_fills_its_folders(cluster: Cluster, tiny: TinyRun, tmp_path: Path) -> None:
    words = tiny.flags(tmp_path / "sweep", max_steps=2)
    options = dict(zip([word.removeprefix("--") for word in words[::2]], words[1::2], strict=True))
    grid = tmp_path / "grid.yaml"
    grid.write_text(yaml.safe_dump(options | {"rank": [2, 4]}))
    script = ["slurm/train_array.sbatch", str(grid), "--save_every", "1"]
    output = f"--output={cluster.folder}/task-%a.log"
    one_rank = "--array=0-1 --ntasks-per-node=1 --gpus-per-node=1 --cpus-per-task=1".split()
    number = cluster.command("sbatch", "--parsable", output, *one_rank, *script).strip()
    states = ("squeue", "-h", "-r", "-t", "all", "-o", "%T", "-j", number)
    done = {"COMPLETED", "FAILED"}
    cluster.wait(lambda: set(cluster.command(*states).split()) <= done)
    assert cluster.command(*states).split() == ["COMPLETED"] * 2, cluster.report()
    for rank in (2, 4):
        run = tmp_path / "sweep" / f"rank={rank}"
        written = yaml.safe_load((run / "run.yaml").read_text())
        assert (written["rank"], written["save_every"]) == (rank, 1)
        assert (run / "adapter" / "adapter_model.safetensors").exists()


@pytest.mark.usefixtures("full")
def test_a_time_limit_shorter_than_the_run(
    limited: Future[Submitted], undisturbed: Submitted
) -> None:
    job = limited.result()
    assert job.check_finished() == undisturbed.check_finished()
    assert "attempt 2, on" in job.log
    assert yaml.safe_load((job.folder / "run.yaml").read_text())["signal_lead"] == "1s"
