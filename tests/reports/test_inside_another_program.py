"""Programs of a user that call the package, and have begun other things themselves."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sparse_lora_dist.distributed.launch import Launch
from sparse_lora_dist.errors import UserError
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


def test_a_process_group_of_other_ranks_than_the_environment_says() -> None:
    Launch(launcher="torchrun", rank=1, world_size=2).check_group(1, 2, "cpu:gloo", gpu=False)
    with pytest.raises(UserError, match="as rank 1 of 2, but by the environment it is rank 0 of 1"):
        Launch(launcher="python").check_group(1, 2, "cpu:gloo", gpu=False)


@pytest.mark.parametrize(("backends", "lacks"), [("cuda:nccl", "cpu"), ("cpu:gloo", "cuda")])
def test_a_process_group_without_a_backend_for_a_device(backends: str, lacks: str) -> None:
    with pytest.raises(UserError, match=f"lacks a backend for tensors on {lacks}"):
        Launch(launcher="python").check_group(0, 1, backends, gpu=True)
