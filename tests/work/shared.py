"""What workers run for ``test_shared.py``."""

from collections import Counter
from typing import Any
from unittest.mock import patch

from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3

from sparse_lora_dist import methods
from tests.fixtures.toy_shared import TOY_SHARED
from tests.work import engine as engine_work
from tests.work import run as run_work

KNOWN = {"toy_shared": TOY_SHARED}


def train(flags: list[str]) -> str:
    """The main job, in a program that knows the method of shared tensors."""
    with patch.dict(methods.METHODS, KNOWN):
        return run_work.train(flags)


def first_step(flags: list[str]) -> tuple[engine_work.FirstStep, list[int]]:
    """Of a job of one step, and how often DeepSpeed took each trained tensor's gradient in it."""
    taken: Counter[int] = Counter()
    usual = DeepSpeedZeroOptimizer_Stage3.reduce_ready_partitions_and_remove_grads

    def counted(self: Any, parameter: Any) -> None:
        taken[parameter.ds_id] += 1
        usual(self, parameter)

    with (
        patch.dict(methods.METHODS, KNOWN),
        patch.object(
            DeepSpeedZeroOptimizer_Stage3, "reduce_ready_partitions_and_remove_grads", counted
        ),
    ):
        return engine_work.first_step(flags), list(taken.values())
