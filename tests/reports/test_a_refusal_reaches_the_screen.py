"""Whatever started the ranks, and whichever of them is slow: the reason stands on the screen, once.

Launchers end all ranks as soon as one has ended. A rank that leaves before another has written the
reason would take it away.
"""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from sparse_lora_dist.distributed import comm
from sparse_lora_dist.distributed.launch import find_launch
from sparse_lora_dist.distributed.phases import fail_together
from sparse_lora_dist.distributed.shared_message import name_of
from sparse_lora_dist.errors import HeldError, StorageError, UserError
from tests.distributed.test_launchers import REPOSITORY, TORCHRUN, start
from tests.tiers import in_full

pytestmark = pytest.mark.usefixtures("processes")
HERE = {"PYTHONPATH": str(REPOSITORY)}
PROGRAM = str(REPOSITORY / "tests/work/refusing.py")


def variables(launcher: str, rank: int, ranks: int, port: str) -> dict[str, str]:
    """What a launcher tells a rank. mpirun says no port."""
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    usual = {"RANK": rank, "WORLD_SIZE": ranks, "LOCAL_RANK": rank}
    found: dict[str, dict[str, object]] = {
        "torchrun": {**usual, **place, "LOCAL_WORLD_SIZE": ranks, "TORCHELASTIC_RUN_ID": port},
        "deepspeed": {**usual, **place, "LOCAL_SIZE": ranks, "CROSS_SIZE": 1},
        "mpirun": {
            "OMPI_COMM_WORLD_RANK": rank,
            "OMPI_COMM_WORLD_SIZE": ranks,
            "OMPI_COMM_WORLD_LOCAL_RANK": rank,
            "OMPI_COMM_WORLD_LOCAL_SIZE": ranks,
        },
        "srun": {
            "SLURM_STEP_ID": 0,
            "SLURM_PROCID": rank,
            "SLURM_STEP_NUM_TASKS": ranks,
            "SLURM_LOCALID": rank,
            "SLURM_STEP_TASKS_PER_NODE": ranks,
            "SLURM_NODEID": 0,
            "SLURM_JOB_ID": port,
            "SLURM_STEP_NODELIST": "n1",
        },
        "environment": {**usual, **place},
    }
    return {name: str(value) for name, value in found[launcher].items()}


class Launched:
    """Ranks of the program, as a launcher starts and ends them."""

    def __init__(
        self, folder: Path, slow: int, how: str, launcher: str = "torchrun", ranks: int = 2
    ) -> None:
        folder.mkdir(exist_ok=True)
        self.screen = folder / "screen"
        port = "29500"  # DeepSpeed's usual one
        with self.screen.open("w") as file:
            self.ranks = [
                subprocess.Popen(
                    [sys.executable, PROGRAM, str(slow), how],
                    cwd=folder,
                    env=HERE | variables(launcher, rank, ranks, port),
                    stderr=file,
                )
                for rank in range(ranks)
            ]

    def end(self) -> str:
        """End all ranks when one has ended, as torchrun, deepspeed and mpirun do. Return what
        stands on the screen."""
        while all(rank.poll() is None for rank in self.ranks):
            time.sleep(0.01)
        for rank in self.ranks:
            rank.terminate()
        for rank in self.ranks:
            rank.wait(timeout=30)
        return self.screen.read_text()


@pytest.mark.parametrize("slow", [0, in_full(1)])
def test_all_ranks_find_the_fault_and_one_of_them_is_slow(slow: int, tmp_path: Path) -> None:
    launchers = ("torchrun", "deepspeed", "mpirun", "srun", "environment")
    launched = [Launched(tmp_path / name, slow, "finding", name) for name in launchers]
    for ranks in launched:
        said = ranks.end()
        assert said.count("error: the configuration has 1 problem") == 1, said
        assert {2} == {rank.returncode for rank in ranks.ranks}


def test_two_launches_with_one_command_and_port_both_say_the_reason(tmp_path: Path) -> None:
    launched = [Launched(tmp_path / name, 0, "finding") for name in ("a", "b")]
    for ranks in launched:
        assert ranks.end().count("  - the reason") == 1


def test_ranks_of_one_launch_meet_whatever_their_launcher_adds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    names = set()
    for rank, word in enumerate(("--local_rank=0", "--local_rank=1", "--local-rank=2")):
        launch = find_launch(variables("deepspeed", rank, 3, "29500"))
        monkeypatch.setattr(sys, "argv", ["train.py", word, "--rank", "4"])
        names.add(name_of(launch, {}))
    assert len(names) == 1
    monkeypatch.setattr(sys, "argv", ["train.py", "--rank", "8"])
    assert name_of(launch, {}) not in names


def test_eight_ranks_say_it_once(tmp_path: Path) -> None:
    said = Launched(tmp_path, 7, "finding", ranks=8).end()
    assert said.count("  - the reason") == 1, said


def test_one_rank_alone_finds_the_fault(tmp_path: Path) -> None:
    said = Launched(tmp_path, 1, "alone").end()
    assert said == "error: only this rank knows the reason\n"


def test_the_rank_that_failed_writes_its_traceback_before_the_others_leave(tmp_path: Path) -> None:
    said = Launched(tmp_path, 1, "another").end()
    assert said.count("error: rank 1 failed while reading") == 1, said
    assert "KeyError: 'its own traceback'" in said


def test_a_signal_that_comes_before_the_reason_is_written_leaves_time_to_write(
    tmp_path: Path,
) -> None:
    ranks = Launched(tmp_path, 0, "writing", ranks=1)
    while "writing" not in ranks.screen.read_text():
        time.sleep(0.01)
    ranks.ranks[0].terminate()
    assert "error: the configuration has 1 problem:\n  - the reason" in ranks.end()


def test_under_torchrun_the_rank_that_is_slow_loses_nothing() -> None:
    command = [*TORCHRUN, PROGRAM, "0", "finding"]
    ended = start(command, OMP_NUM_THREADS="1", **HERE)
    assert ended.status != 0
    assert ended.err.count("error: the configuration has 1 problem") == 1, ended.err


@pytest.mark.parametrize(
    ("failures", "kind", "said"),
    [
        ([("it is held", "HeldError"), None], HeldError, "it is held"),
        ([None, ("full", "StorageError")], StorageError, "rank 1 failed while saving: full"),
        ([("no", "UserError"), ("no", "UserError")], UserError, "no"),
        ([None, ("KeyError", "UserError")], UserError, "rank 1 failed while saving: KeyError"),
    ],
)
def test_ranks_that_did_not_fail_end_with_the_kind_and_the_words_of_the_rank_that_did(
    failures: list[tuple[str, str] | None],
    kind: type[UserError],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(comm, "gather_objects", lambda value, after="": failures)
    with pytest.raises(kind) as caught:
        with fail_together("saving"):
            pass
    assert type(caught.value) is kind and caught.value.shared
    assert f"{caught.value.found_by}{caught.value}" == said


def test_the_rank_that_failed_alone_says_which_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comm, "gather_objects", lambda value, after="": [None, value])
    monkeypatch.setattr(comm, "rank", lambda: 1)
    with pytest.raises(UserError, match="^no$") as caught:
        with fail_together("reading"):
            raise UserError("no")
    assert caught.value.found_by == "rank 1 failed while reading: "
