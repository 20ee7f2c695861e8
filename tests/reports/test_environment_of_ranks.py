"""Environment variables with wrong values: refused before anything is loaded."""

import time
from pathlib import Path

import pytest

from sparse_lora_dist.distributed.launch import Launch, find_launch
from sparse_lora_dist.errors import UserError

RANKS = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
PLACE = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
STEP = {
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "0",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_TASKS_PER_NODE": "2",
    "SLURM_NODEID": "0",
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "a1",
}


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"MASTER_PORT": "99999"}, "MASTER_PORT=99999 must be a port from 1 to 65535"),
        ({"MASTER_PORT": "0"}, "MASTER_PORT=0 must be a port"),
        ({"MASTER_PORT": "-1"}, "MASTER_PORT='-1' must be a whole number"),
        ({"MASTER_PORT": ""}, "MASTER_PORT='' must be a whole number"),
        ({"MASTER_PORT": "9" * 5000}, "must be a whole number"),
        ({"MASTER_ADDR": ""}, "MASTER_ADDR='' must be the name or IP address"),
        ({"MASTER_ADDR": "a b"}, "MASTER_ADDR='a b' must be"),
        ({"MASTER_ADDR": "a\n"}, "must be the name or IP address"),
        ({"RANK": "9" * 5000}, "must be a whole number"),
        ({"SLURM_RESTART_COUNT": "x"}, "SLURM_RESTART_COUNT='x' must be a whole number"),
        ({"SLURM_RESTART_COUNT": ""}, "SLURM_RESTART_COUNT='' must be a whole number"),
        ({"SLURM_RESTART_COUNT": "9" * 5000}, "must be a whole number"),
    ],
)
@pytest.mark.parametrize("launcher", [RANKS, STEP], ids=["environment", "srun"])
def test_a_variable_with_a_wrong_value_is_named(
    changed: dict[str, str], said: str, launcher: dict[str, str]
) -> None:
    if launcher is STEP and "RANK" in changed:
        changed = {"SLURM_PROCID": changed["RANK"]}
    with pytest.raises(UserError) as caught:
        find_launch(launcher | PLACE | changed)
    assert said in str(caught.value) and len(str(caught.value)) < 400


def test_a_restart_count_is_checked_without_a_launcher_too() -> None:
    with pytest.raises(UserError, match="SLURM_RESTART_COUNT"):
        find_launch({"SLURM_RESTART_COUNT": "many"})


def test_a_host_that_nobody_knows_is_refused_within_seconds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sparse_lora_dist.distributed.launch.RESOLVE_S", 0.5)
    launch = Launch(launcher="environment", world_size=2, address="no-such-host.invalid", port=9)
    started = time.monotonic()
    with pytest.raises(UserError, match="MASTER_ADDR=no-such-host.invalid is not known on"):
        launch.check_address()
    assert time.monotonic() - started < 60


def test_a_host_that_is_known_passes() -> None:
    Launch(launcher="environment", world_size=2, address="127.0.0.1", port=9).check_address()
    Launch(launcher="python").check_address()


def test_the_commit_is_that_of_the_package_and_of_no_project_around_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, processes: None
) -> None:
    import subprocess

    from sparse_lora_dist.run_folder import description

    assert len((description.git_commit() or "").split("+")[0]) == 40
    project = tmp_path / "project"
    installed = project / "venv/lib/sparse_lora_dist/run_folder/description.py"
    installed.parent.mkdir(parents=True)
    git = ["git", "-C", str(project), "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "x"]):
        subprocess.run([*git, *words], check=True)
    monkeypatch.setattr(description, "__file__", str(installed))
    assert description.git_commit() is None
