"""--output_dir on a disk of each node: refused before anything is loaded, not at the first save."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.conftest import Ranks
from tests.distributed.test_launchers import BIN, ENGINE, KEPT, REPOSITORY, free_port
from tests.fixtures.tiny_run import TinyRun

SHARED = "tests.work.folders:shared"


def test_one_folder_for_all_ranks_passes(ranks: Ranks, tmp_path: Path) -> None:
    assert ranks(2, SHARED, folders=[tmp_path / "a"] * 2) == ["shared"] * 2
    assert not (tmp_path / "a").exists()


def test_a_folder_that_only_rank_0_sees_is_refused(ranks: Ranks, tmp_path: Path) -> None:
    for said in ranks(2, SHARED, folders=[tmp_path / "a", tmp_path / "b"]):
        assert f"--output_dir {tmp_path}" in said and "is not one folder for all ranks" in said
        assert f"node {os.uname().nodename} (rank 1): it does not see the folder" in said
        assert "Choose a folder on a file system that all nodes share" in said
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_the_same_name_is_told_from_that_of_rank_0(
    ranks: Ranks, tmp_path: Path
) -> None:
    (tmp_path / "b").mkdir()
    folders = [tmp_path / "a", tmp_path / "b"]
    for said in ranks(2, SHARED, folders=folders):
        assert "(rank 1): it sees another folder of this name, in which rank 0 has written" in said
    process = {"host": "n", "pids": "p", "pid": 1, "started": 1}
    lock = {"process": process, "job": None, "attempt": 0, "since": "s", "token": "t"}
    for said in ranks(2, SHARED, folders=folders, token=json.dumps(lock)):
        assert "(rank 1): it sees another folder of this name, with the lock of a job" in said
    assert (tmp_path / "b" / "run.lock").exists() and not (tmp_path / "a").exists()


@pytest.mark.usefixtures("full", "processes")
def test_two_nodes_with_a_disk_each_end_before_the_base_is_loaded(
    tiny: TinyRun, tmp_path: Path
) -> None:
    """Two ranks, each with a disk of its own under the name of the run folder."""
    unshare = shutil.which("unshare") or ""
    if not unshare or subprocess.run([unshare, "--mount", "true"], capture_output=True).returncode:
        pytest.skip("a disk for each node needs mount namespaces, which this user may not make")
    (tmp_path / "disk").mkdir()
    flags = tiny.flags(tmp_path / "disk" / "run", max_steps=2)
    mount = f'mount -t tmpfs none {tmp_path}/disk && exec python launcher/train.py "$@"'
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "OMP_NUM_THREADS": "1"}
    kept = {name: os.environ[name] for name in KEPT if name in os.environ}
    ranks = [
        subprocess.Popen(
            [unshare, "--mount", "sh", "-c", mount, "sh", *ENGINE, *flags],
            cwd=REPOSITORY,
            env=kept
            | {"PATH": f"{BIN}:{os.environ['PATH']}", "RANK": str(rank), "WORLD_SIZE": "2"}
            | {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
            | place,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    for rank in ranks:
        out, err = rank.communicate(timeout=240)
        assert rank.returncode == 2 and "is not one folder for all ranks" in err, err
        assert "base " not in out
