"""Programs of a user that call the package, and have begun other things themselves."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from sparse_lora_dist.distributed.launch import Launch
from sparse_lora_dist.errors import HeldError, UserError
from sparse_lora_dist.run_folder import lock
from sparse_lora_dist.runtime import stop_signals
from tests.fixtures.tiny_run import TinyRun

RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
SHORT = {"rank": 4, "max_steps": 2, "sequence_length": 64, "trackers": [], "eval_batches": 1}


def run_program(program: str, folder: Path) -> str:
    """Run a program in a folder, outside of any launcher. Return what it printed."""
    environ = {name: value for name, value in os.environ.items() if name not in RANKS}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=folder, env=environ, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def options_of(tiny: TinyRun) -> dict[str, object]:
    return {"model": str(tiny.model), "data": str(tiny.data), "output_dir": "run", **SHORT}


@pytest.mark.usefixtures("processes")
def test_a_process_group_that_the_program_has_made_is_used(tiny: TinyRun, tmp_path: Path) -> None:
    """DeepSpeed asked for LOCAL_RANK, which only our own start had set."""
    program = f"""
import sparse_lora_dist as sld
import torch.distributed as dist
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
sld.run(sld.settings(**{options_of(tiny)}))
"""
    assert "trained   2 of 2 steps" in run_program(program, tmp_path)


@pytest.mark.usefixtures("processes")
def test_programs_that_are_started_after_a_run_are_no_ranks(tiny: TinyRun, tmp_path: Path) -> None:
    """accelerate asked for MASTER_ADDR, and mpirun's ranks found another rank in RANK."""
    program = f"""
import os
import sparse_lora_dist as sld
for step in (1, 2):
    options = {options_of(tiny)} | dict(max_steps=2, stop_after=step, resume="auto")
    sld.run(sld.settings(**options))
    print("left", [name for name in {RANKS} if name in os.environ])
"""
    assert run_program(program, tmp_path).count("left []") == 2


def test_a_process_group_of_other_ranks_than_the_environment_says() -> None:
    Launch(launcher="torchrun", rank=1, world_size=2).check_group(1, 2, "cpu:gloo", gpu=False)
    with pytest.raises(UserError, match="as rank 1 of 2, but by the environment it is rank 0 of 1"):
        Launch(launcher="python").check_group(1, 2, "cpu:gloo", gpu=False)


@pytest.mark.parametrize(("backends", "lacks"), [("cuda:nccl", "cpu"), ("cpu:gloo", "cuda")])
def test_a_process_group_without_a_backend_for_a_device(backends: str, lacks: str) -> None:
    with pytest.raises(UserError, match=f"lacks a backend for tensors on {lacks}"):
        Launch(launcher="python").check_group(0, 1, backends, gpu=True)


def in_fork(work: Callable[[], object]) -> int:
    """Call a function in a fork of this process. Return the fork's process ID."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        finally:
            os._exit(0)
    return pid


@pytest.mark.usefixtures("processes")
def test_a_forked_process_leaves_the_lock_where_it_is(tmp_path: Path) -> None:
    block = lock.held(tmp_path / "run")
    block.__enter__()

    def writes() -> None:
        with pytest.raises(HeldError, match="forked from that of the run"):
            lock.check()
        (tmp_path / "refused").touch()

    for work in (writes, lambda: block.__exit__(None, None, None)):
        os.waitpid(in_fork(work), 0)
        assert lock.is_ours()
    assert (tmp_path / "refused").exists()
    block.__exit__(None, None, None)
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("processes")
def test_a_signal_to_a_process_that_was_just_forked_is_not_the_run_s(tmp_path: Path) -> None:
    with stop_signals.listening(None):
        for _ in range(20):
            child = in_fork(lambda: time.sleep(60))
            os.kill(child, signal.SIGTERM)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
        stop_signals.check()


@pytest.mark.usefixtures("processes")
def test_a_forked_process_that_leaves_the_block_changes_nothing(
    tiny: TinyRun, tmp_path: Path
) -> None:
    """It gave the lock of its parent back, and ended its heartbeats."""
    program = f"""
import os, sys
from pathlib import Path
import sparse_lora_dist as sld

try:
    with sld.training(sld.settings(**{options_of(tiny)})) as now:
        now.step(1)
        for why in (SystemExit(0), ValueError("a bug"), None):
            pid = os.fork()
            if pid == 0 and why is not None:
                raise why
            if pid == 0:
                break
            os.wait()
            told = [path for path in Path("run/ranks").iterdir() if "true" in path.read_text()]
            print(Path("run/run.lock").exists(), told, flush=True)
        else:
            now.step(2)
except BaseException as error:
    print(type(error).__name__, error, flush=True)
    os._exit(0)
"""
    lines = run_program(program, tmp_path).splitlines()
    assert [line for line in lines if line[:4] in ("True", "Fals")] == ["True []"] * 3
    assert "SystemExit 0" in lines and "ValueError a bug" in lines
    assert any(line.startswith("UserError This process was forked") for line in lines)
    assert any(line.startswith("trained   2 of 2 steps") for line in lines)
