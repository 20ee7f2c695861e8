"""What the workers of ``tests/ranks.py`` run for the tests of runs that are told to stop."""

import os
import signal
import time
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import psutil

from sparse_lora_dist import checkpoint
from sparse_lora_dist.distributed import comm
from sparse_lora_dist.errors import Stopped
from sparse_lora_dist.runtime import stop_signals
from sparse_lora_dist.tasks import causal_lm
from sparse_lora_dist.training.job import Job
from sparse_lora_dist.zero3.engine import Engine
from tests.work.run import train

POINTS: dict[str, tuple[Any, str]] = {
    "micro-batch": (Engine, "backward"),
    "evaluation": (causal_lm, "batch_loss"),  # training has its own reference to it
    "saving": (checkpoint.save, "_write"),
    "publishing": (Job, "_publish"),
    "after a step": (Job, "after_step"),
}
"""Where a signal comes: as this function is entered."""


def stopped(flags: list[str], *, point: str, call: int, name: str, rank: int) -> str:
    """Train until ``rank`` gets signal ``name`` as ``point`` is reached for the ``call``-th time;
    why the run says it ended."""
    owner, attribute = POINTS[point]
    usual: Callable[..., Any] = getattr(owner, attribute)
    calls = 0

    def interrupted(*args: Any, **rest: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call and comm.rank() == rank:
            os.kill(os.getpid(), signal.Signals[name])
            while stop_signals._request is not None and stop_signals._request.code == 0:
                time.sleep(0.01)  # the listener has read it
        return usual(*args, **rest)

    with patch.object(owner, attribute, interrupted):
        return why_it_stopped(flags)


def why_it_stopped(flags: list[str]) -> str:
    """The text of the Stopped that the job ends with."""
    before = [signal.getsignal(number) for number in stop_signals.SIGNALS]
    try:
        train(flags)
    except Stopped as why:
        assert [signal.getsignal(number) for number in stop_signals.SIGNALS] == before
        return str(why)
    raise AssertionError("the job went on to its end")


def out_of_time(flags: list[str], seconds: float) -> str:
    """Train at two steps a second, in a process that may live so much longer."""

    def slow(self: Job, *args: Any, **rest: Any) -> Any:
        time.sleep(0.5)
        return usual(self, *args, **rest)

    usual = Job.after_step
    age_s = time.time() - psutil.Process().create_time()
    with patch.object(Job, "after_step", slow):
        return why_it_stopped([*flags, "--time_limit", f"{age_s + seconds:.1f}s"])
