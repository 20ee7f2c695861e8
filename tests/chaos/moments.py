"""Where a rank may be killed: as one of these functions is entered, or has returned.

Called by name on the workers of ``tests/ranks.py``.
"""

import os
import random
import signal
import threading
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

from sparse_lora_dist import checkpoint
from sparse_lora_dist.checkpoint import save
from sparse_lora_dist.checkpoint.saved_slices import SavedSlices
from sparse_lora_dist.distributed import comm
from sparse_lora_dist.export import peft_adapter
from sparse_lora_dist.optim.sparse_adamw import SparseAdamW
from sparse_lora_dist.run_folder.metrics_file import JsonLines
from sparse_lora_dist.sparsity.shards import Shards
from sparse_lora_dist.tasks import causal_lm
from sparse_lora_dist.training.job import Job
from sparse_lora_dist.zero3.engine import Engine
from tests.work.run import train

MOMENTS: dict[str, tuple[Any, str]] = {
    "a backward": (Engine, "backward"),
    "an optimizer step": (SparseAdamW, "step"),
    "a decision": (Shards, "decide"),
    "an evaluation": (causal_lm, "batch_loss"),
    "copying to the host": (save, "_copied_to_host"),
    "writing a rank's file": (save, "save_file"),
    "syncing a file": (os, "fsync"),
    "sealing a manifest": (save, "sealed"),
    "renaming": (os, "rename"),
    "replacing a file": (os, "replace"),
    "removing a folder": (os, "rmdir"),
    "retention": (checkpoint, "retain"),
    "a row of metrics": (JsonLines, "append"),
    "restoring": (SavedSlices, "entries"),
    "cleaning": (checkpoint, "clean"),
    "exporting": (peft_adapter, "save_peft"),
    "the summary": (Job, "finish"),
}
HALF = "half of a rank's file"
"""Killed when that much of it is written."""
ANY_TIME = "any time"
"""So many seconds after the start."""


def train_until(
    flags: list[str], moment: str, call: float, after: bool, victim: int, everybody: bool
) -> None:
    """The main job; at the ``call``-th ``moment`` of a rank it, or everybody, is killed."""
    pids = comm.gather_objects(os.getpid())

    def kill() -> None:
        others = [pid for pid in pids if pid != os.getpid()] if everybody else []
        for pid in [*others, os.getpid()]:
            os.kill(pid, signal.SIGKILL)

    with ExitStack() as stack:
        if comm.rank() != victim:
            pass
        elif moment == ANY_TIME:
            timer = threading.Timer(call, kill)
            timer.start()
            stack.callback(timer.cancel)
        elif moment == HALF:
            stack.enter_context(_half_written(int(call), kill))
        else:
            owner, name = MOMENTS[moment]
            usual, calls = getattr(owner, name), Counter[str]()

            def interrupted(*args: Any, **rest: Any) -> Any:
                calls[name] += 1
                due = calls[name] == call
                if due and not after:
                    kill()
                result = usual(*args, **rest)
                if due and after:
                    kill()
                return result

            stack.enter_context(patch.object(owner, name, interrupted))
        train(flags)


def _half_written(call: int, kill: Any) -> Any:
    usual, calls = save.save_file, Counter[str]()

    def half(own: Any, path: Path, **rest: Any) -> None:
        usual(own, path, **rest)
        calls["save_file"] += 1
        if calls["save_file"] == call:
            os.truncate(path, path.stat().st_size // 2)
            kill()

    return patch.object(save, "save_file", half)


def calls_of_each(flags: list[str]) -> dict[str, int]:
    """Train undisturbed; how often each moment came on this rank."""
    calls: Counter[str] = Counter()
    with ExitStack() as stack:
        for moment, (owner, name) in MOMENTS.items():
            usual = getattr(owner, name)

            def counted(*args: Any, _usual: Any = usual, _moment: str = moment, **rest: Any) -> Any:
                calls[_moment] += 1
                return _usual(*args, **rest)

            stack.enter_context(patch.object(owner, name, counted))
        train(flags)
    calls[HALF] = calls["writing a rank's file"]
    return dict(calls)


def drawn(numbers: random.Random, calls: list[dict[str, int]], left: float) -> dict[str, Any]:
    """A moment in the next part of what is ``left`` of the run, and who is killed then."""
    moment = numbers.choice([*MOMENTS, HALF, ANY_TIME])
    could = [rank for rank, own in enumerate(calls) if own.get(moment)] or list(range(len(calls)))
    victim = numbers.choice(could)
    number = 1 + int(numbers.random() * calls[victim].get(moment, 1) * left / 3)
    return {
        "moment": moment,
        "call": numbers.uniform(0.0, 4.0) if moment == ANY_TIME else number,
        "after": numbers.random() < 0.5,
        "victim": victim,
        "everybody": numbers.random() < 0.5,
    }
