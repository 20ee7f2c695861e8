"""The scripts of slurm/ in a shell without Slurm: its programs are stand-ins that print what they
are given. Slurm runs a copy of the script, in the folder from which it was submitted."""

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

pytestmark = pytest.mark.usefixtures("processes")

REPOSITORY = Path(__file__).parents[2]
SCRIPTS = ("train.sbatch", "train_array.sbatch", "export.sbatch")
PYTHON = """\
case $1 in
*grid.py) printf '%s\\n' --rank 8 "${@:4}" ;;
*) echo "python $*" ;;
esac
"""


@dataclass(frozen=True)
class Job:
    """A job of Slurm whose script is a copy of one of slurm/."""

    folder: Path
    repository: Path

    def run(
        self, script: str, *words: str, command: str | None = None, cwd: Path | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run the script as Slurm would.

        Args:
            script: its name in slurm/.
            words: what follows it on sbatch's command line.
            command: the path that scontrol says was submitted; "" if scontrol fails.
            cwd: the folder in which sbatch was called.
        """
        path = self.repository / "slurm" / script
        said = " ".join([str(path) if command is None else command, *words])
        show = f"echo '   UserId=me(1)'; echo '   Command={said}'" if command != "" else "exit 1"
        programs = {"scontrol": show, "srun": '"${@:3}"', "python": PYTHON, "timeout": "exit 0"}
        for name, text in programs.items():
            program = self.folder / "bin" / name
            program.parent.mkdir(exist_ok=True)
            program.write_text(f"#!/bin/bash\n{text}\n")
            program.chmod(0o755)
        copy = self.folder / "spool" / "slurm_script"
        copy.parent.mkdir(exist_ok=True)
        shutil.copy(path, copy)
        variables = {
            "PATH": f"{self.folder}/bin:/usr/bin:/bin",
            "SLURM_JOB_ID": "12",
            "SLURM_JOB_NUM_NODES": "1",
            "SLURM_JOB_NODELIST": "n1",
            "SLURM_ARRAY_TASK_ID": "0",
        }
        return subprocess.run(
            ["bash", str(copy), *words],
            cwd=cwd or self.folder,
            env=variables,
            capture_output=True,
            text=True,
            check=False,
        )


@pytest.fixture
def job(tmp_path: Path) -> Job:
    """Its repository lies in a folder whose name has a space, and nobody may write into it."""
    repository = tmp_path / "a clone"
    (repository / "launcher").mkdir(parents=True)
    shutil.copytree(REPOSITORY / "slurm", repository / "slurm")
    for path in (repository, repository / "slurm"):
        path.chmod(0o555)
    return Job(tmp_path, repository)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_submitted_from_another_folder_finds_its_own(job: Job, script: str) -> None:
    words = ["grid.yaml"] if "array" in script else []
    ended = job.run(script, *words, "--data", "my data.jsonl")
    program = "export" if "export" in script else "train"
    assert f"python {job.repository}/launcher/{program}.py" in ended.stdout, ended
    assert "--data my data.jsonl" in ended.stdout
    assert ended.returncode == 0 and ended.stderr == ""


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_copy_of_a_script_runs_in_the_repositorys_folder(job: Job, script: str) -> None:
    for command in ("/home/me/mine.sbatch", ""):
        ended = job.run(script, "x", command=command, cwd=job.repository)
        assert f"python {job.repository}/launcher" in ended.stdout, ended
        assert ended.returncode == 0


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_that_does_not_find_the_repository_says_what_to_do(job: Job, script: str) -> None:
    ended = job.run(script, "x", command="/home/me/mine.sbatch")
    said = f"slurm     {job.folder} is not the repository's folder"
    assert said in ended.stdout and "--chdir" in ended.stdout
    assert ended.returncode == 2 and ended.stderr == ""


def test_a_path_among_the_options_that_looks_like_the_script_is_not_taken(job: Job) -> None:
    ended = job.run("train.sbatch", "--data", "/other/slurm/x.sbatch y")
    assert f"python {job.repository}/launcher/train.py" in ended.stdout, ended


def test_a_virtual_environment_of_the_repository_is_used(job: Job) -> None:
    job.repository.chmod(0o755)
    python = job.repository / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text("#!/bin/bash\necho own $*\n")
    python.chmod(0o755)
    assert f"own {job.repository}/launcher/train.py" in job.run("train.sbatch").stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_slurms_lines_come_before_any_command(script: str) -> None:
    lines = (REPOSITORY / "slurm" / script).read_text().splitlines()
    commands = [i for i, line in enumerate(lines) if line and not line.startswith("#")]
    assert not any(line.startswith("#SBATCH") for line in lines[commands[0] :])
    assert os.access(REPOSITORY / "slurm" / script, os.R_OK)
