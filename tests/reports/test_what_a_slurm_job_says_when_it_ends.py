"""The scripts of slurm/ with a Slurm of small scripts: what a log says, and what is requeued."""

import os
import subprocess
from pathlib import Path

import pytest

from sparse_lora_dist.distributed.launch_slurm import tasks_without_srun
from sparse_lora_dist.errors import HeldError, StorageError, UserError
from sparse_lora_dist.runtime.entry_point import HELD, STATUS, STOPPED

pytestmark = pytest.mark.usefixtures("processes")
REPOSITORY = Path(__file__).parents[2]
SRUN = """#!/bin/sh
for word; do last=$word; done
case "$*" in
    *" true") exit ${NODES:-0} ;;
    *"command -v python"*) exit ${PYTHON:-0} ;;
    *) echo "srun $*"; exit $STATUS ;;
esac
"""
SIGNAL = "#SBATCH --signal=USR1@300"


def job(
    tmp_path: Path, status: int, *, signal: str = SIGNAL, script: str = "train", **state: int
) -> tuple[int, str]:
    """Status and log of a job whose ranks end with ``status``. ``state``: NODES and PYTHON, the
    statuses of a question to every node."""
    for name, text in (("srun", SRUN), ("scontrol", "#!/bin/sh\necho scontrol $*\n")):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    text = (REPOSITORY / "slurm" / f"{script}.sbatch").read_text()
    (tmp_path / "script").write_text(text.replace(SIGNAL, signal))
    slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "n[1-2]"}
    told = {"STATUS": str(status)} | {name: str(value) for name, value in state.items()}
    ended = subprocess.run(
        ["bash", str(tmp_path / "script"), "--rank", "4"],
        cwd=REPOSITORY,
        env=slurm | told | {"PATH": f"{tmp_path}:{os.environ['PATH']}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return ended.returncode, ended.stdout


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (0, "slurm     finished"),
        (1, "slurm     status 1: not requeued"),
        (2, "slurm     status 2: trying again would not mend what the error above names"),
        (HELD, "status 73: another job writes the run folder. Once it has ended, the same sbatch"),
        (137, "status 137: a rank was killed (signal 9), by a person or because memory ran out"),
    ],
)
def test_a_job_that_is_not_requeued_says_why(status: int, said: str, tmp_path: Path) -> None:
    ended, log = job(tmp_path, status)
    assert ended == status and said in log.splitlines()[-1] and "scontrol" not in log


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (STOPPED, "stopped for now, as the lines above say; requeues"),
        (143, "a signal came before the program listened; requeues"),
    ],
)
def test_a_job_that_may_go_on_is_requeued(status: int, said: str, tmp_path: Path) -> None:
    ended, log = job(tmp_path, status)
    assert ended == 0 and said in log and log.endswith("scontrol requeue 7\n")
    assert "saved" not in log  # nobody knows: a full disk ends with this status too


def test_a_python_that_is_missing_on_a_node_is_not_called_a_wrong_option(tmp_path: Path) -> None:
    ended, log = job(tmp_path, 2, PYTHON=1)
    assert ended == 2 and "no python in PATH on some node" in log and "not mend" not in log


@pytest.mark.parametrize(
    ("line", "lead"),
    [
        ("#SBATCH --signal=USR1@300", "300s"),
        ("#SBATCH --signal=USR1@300  # comment", "300s"),
        ("#SBATCH --signal=R:USR1@300", "300s"),
        ("#SBATCH --signal USR1@300", "300s"),
        ('#SBATCH --signal="USR1@300"', "300s"),
        ("#SBATCH --signal=SIGUSR1@300", "300s"),
        ("#SBATCH --signal=usr1@300", "300s"),
        ("#SBATCH --signal=10@300", "300s"),
        ("#SBATCH --signal=TERM@300", "300s"),
        ("#SBATCH --signal=USR1", "60s"),
        ("#SBATCH -t 60 --signal=USR1@300 --mem=1G", "300s"),
        ("#SBATCH --signal=USR1@60\n#SBATCH --signal=USR1@300", "300s"),
        ("##SBATCH --signal=USR1@60", None),
        ("# none", None),
    ],
)
def test_the_lead_is_found_as_slurm_reads_it(line: str, lead: str | None, tmp_path: Path) -> None:
    _, log = job(tmp_path, 0, signal=line)
    wanted = "--rank 4" if lead is None else f"--signal_lead {lead} --rank 4"
    assert f"launcher/train.py --resume auto {wanted}\n" in log
    assert "warning" not in log


@pytest.mark.parametrize("signal", ["B:USR1@300", "HUP@30", "USR1@5m"])
def test_a_signal_that_tells_the_ranks_nothing_is_named(signal: str, tmp_path: Path) -> None:
    _, log = job(tmp_path, 0, signal=f"#SBATCH --signal={signal}")
    assert f"slurm     warning: --signal={signal} does not tell the ranks to save" in log
    assert "--signal_lead" not in log


def test_an_evaluation_has_a_script_too(tmp_path: Path) -> None:
    ended, log = job(tmp_path, 0, script="eval")
    assert ended == 0 and log.startswith("srun --kill-on-bad-exit=0 --wait=60 python ")
    assert log.endswith("launcher/eval.py --rank 4\n")


def test_kinds_of_errors_have_statuses_of_their_own() -> None:
    assert STATUS == {HeldError: 73, StorageError: 75} and UserError not in STATUS


# --- a batch script that forgets srun ----------------------------------------------------------

BATCH = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2", "SLURM_JOB_NUM_NODES": "2"}


def test_a_script_for_two_tasks_without_srun_is_told_what_to_type() -> None:
    said = tasks_without_srun(BATCH, "launcher/train.py")
    assert said is not None and said.startswith("this job has 2 tasks (SLURM_NTASKS=2), but")
    assert "so 1 rank trains. Start it with: srun python launcher/train.py" in said


@pytest.mark.parametrize(
    ("environ", "warns"),
    [
        ({}, False),
        ({"SLURM_NTASKS": "2"}, False),  # left in a shell of no job
        ({"SLURM_JOB_ID": "7"}, False),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "1", "SLURM_JOB_NUM_NODES": "1"}, False),
        ({"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2"}, True),  # --nodes alone
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "many"}, False),
    ],
)
def test_one_rank_where_one_was_asked_for_is_no_mistake(
    environ: dict[str, str], warns: bool
) -> None:
    assert (tasks_without_srun(environ, "x.py") is not None) == warns
