"""What the workers of ``tests/ranks.py`` run for the tests of steps that go wrong."""

from collections.abc import Iterator
from contextlib import contextmanager
from math import nan
from typing import Any
from unittest.mock import patch

from torch import Tensor

from sparse_lora_dist import train as program
from sparse_lora_dist.distributed import comm
from sparse_lora_dist.training.step import train_step
from sparse_lora_dist.zero3.engine import Engine
from tests.work.run import refusal, train


@contextmanager
def spoilt(what: str, steps: list[int], rank: int) -> Iterator[None]:
    """Inside, loss or gradient of these steps is nan on one rank."""
    now = 0
    usual = Engine.backward

    def backward(self: Engine, loss: Tensor) -> None:
        usual(self, loss * nan if (what, now) in bad and comm.rank() == rank else loss)

    def spoilt_step(*args: Any, step: int, loss_of: Any, **rest: Any) -> Any:
        nonlocal now
        now = step

        def loss(*args: Any) -> Tensor:
            value: Tensor = loss_of(*args)
            return value * nan if ("loss", step) in bad and comm.rank() == rank else value

        return train_step(*args, step=step, loss_of=loss, **rest)

    bad = {(what, step) for step in steps}
    with (
        patch.object(program, "train_step", spoilt_step),
        patch.object(Engine, "backward", backward),
    ):
        yield


def train_spoilt(flags: list[str], what: str, steps: list[int], rank: int = 1) -> str:
    """The main job; what it printed."""
    with spoilt(what, steps, rank):
        return train(flags)


def refusal_spoilt(flags: list[str], what: str, steps: list[int], rank: int = 1) -> str:
    """The user error that the main job ends with."""
    with spoilt(what, steps, rank):
        return refusal(flags)
