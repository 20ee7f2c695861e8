"""Measurements of ``step_time.py``: steps of several engines in turn on the same ranks; and, in one
process, a delta that is formed as a matrix against one that is applied as two factors."""

import random
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from statistics import median
from typing import Any
from unittest.mock import patch

from _side_by_side import Run, build  # isort: skip  # sets the path

import torch
from torch import Tensor

from sparse_lora_dist.distributed import comm
from sparse_lora_dist.methods.shared.triplets import triplet_delta
from sparse_lora_dist.optim.sparse_adamw import SparseAdamW
from sparse_lora_dist.sparsity.decisions import Decisions
from sparse_lora_dist.sparsity.shards import Shards

EVERY, WARM_UP, RANK, TOKENS = 10, 2, 16, 512
TIMED = {"width": 1024, "inner": 2816, "layers": 9}

# Pruning and growth begin at once and go on past the last measured round, so that every EVERY-th
# round holds a decision.
TIMED_OPTIONS: dict[str, dict[str, Any]] = {
    "lora": {},
    "lora, a second one": {},
    "roselora": {"roselora_every": EVERY, "roselora_begin": 0.02},
    "sora": {"sora_every": EVERY},
    "increlora": {
        "increlora_every": EVERY,
        "increlora_begin": 0.02,
        "increlora_end": 0.8,
    },
    "adalora": {"adalora_every": EVERY, "adalora_begin": 0.02},
}
PARTS = {
    "observe": (Shards, "observe"),
    "decide": (Decisions, "make"),
    "confirm": (Decisions, "confirm"),
    "optimizer": (SparseAdamW, "step"),
}


class Stopwatch:
    """Seconds in parts of a step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Inside, every call of a part counts."""
        with ExitStack() as stack:
            for part, (owner, name) in PARTS.items():
                timed = self._timed(part, getattr(owner, name))
                stack.enter_context(patch.object(owner, name, timed))
            yield

    def _timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            out = function(*args, **kwargs)
            self.seconds[part] += time.perf_counter() - started
            return out

        return call


def timed_step(run: Run, step: int, watch: Stopwatch) -> dict[str, float]:
    """Seconds of a step and of its parts, of the slower rank; bytes received for its decision.
    Collective."""
    watch.seconds.clear()
    bytes_before = run.shards.traffic_bytes
    comm.barrier()
    started, cpu_started = time.perf_counter(), time.process_time()
    run.step(step)
    cpu = time.process_time() - cpu_started
    comm.barrier()
    seconds = {"step": time.perf_counter() - started, "cpu": cpu}
    seconds |= {part: watch.seconds[part] for part in PARTS}
    slower = comm.max_over_ranks(torch.tensor(list(seconds.values()))).tolist()
    return {
        **dict(zip(seconds, slower, strict=True)),
        "bytes": run.shards.traffic_bytes - bytes_before,
    }


def times(folder: str, rounds: int, rows: int) -> dict[str, Any]:
    """Every method's measured rounds: {method: [what ``timed_step`` gave]}."""
    steps = int((WARM_UP + rounds) / 0.7)
    runs = {
        name: build(
            name.split(",")[0], options, folder=folder, steps=steps, tokens=TOKENS, rows=rows
        )
        for name, options in TIMED_OPTIONS.items()
    }
    shuffled, watch, measured = random.Random(0), Stopwatch(), defaultdict(list)
    with watch.watching():
        for step in range(1, WARM_UP + rounds + 1):
            for name in shuffled.sample(list(runs), len(runs)):
                seconds = timed_step(runs[name], step, watch)
                if step > WARM_UP:
                    measured[name].append({"decides": step % EVERY == 0, **seconds})
    return {name: measured[name] for name in runs} | {"gathered": gathered_bytes(runs["roselora"])}


def gathered_bytes(run: Run) -> int:
    """What a rank receives where the agreement check gathers every adapter tensor, bf16."""
    trained: Any = run.engine.trained.values()
    return sum(2 * (p.ds_numel - p.ds_tensor.ds_numel) for p in trained)


def dense_delta(x_TI: Tensor, tensors: Mapping[str, Tensor], scale: float) -> Tensor:
    """x (B diag(lambda) A)^T with the product whole, as in the released IncreLoRA's forward."""
    product_OI = tensors["lora_b"] @ (tensors["lora_a"] * tensors["lora_lambda"][:, None])
    return x_TI @ product_OI.t() * scale


def delta_ratios(repeats: int = 41) -> dict[tuple[int, int], tuple[float, float]]:
    """(O, I) -> time of the dense delta's forward and backward in those of the factored one: the
    delta alone, and with the frozen linear, not quantised, beside it. One thread, bf16."""
    torch.set_num_threads(1)
    width, inner = TIMED["width"], TIMED["inner"]
    shapes = [(width // 2, width), (width, width), (inner, width), (width, inner)]
    return {
        shape: (_ratio(shape, False, repeats), _ratio(shape, True, repeats)) for shape in shapes
    }


def _ratio(shape: tuple[int, int], with_base: bool, repeats: int) -> float:
    num_out, num_in = shape
    new = partial(torch.randn, dtype=torch.bfloat16, requires_grad=True)
    x_TI, weight_OI = new(TOKENS, num_in), new(num_out, num_in).detach()
    tensors = {
        "lora_a": new(RANK, num_in),
        "lora_b": new(num_out, RANK),
        "lora_lambda": new(RANK),
    }

    def seconds(delta: Callable[..., Tensor]) -> float:
        started = time.perf_counter()
        y_TO = delta(x_TI, tensors, 1.0)
        if with_base:
            y_TO = y_TO + x_TI @ weight_OI.t()
        torch.autograd.grad(y_TO, [x_TI, *tensors.values()], torch.ones_like(y_TO))
        return time.perf_counter() - started

    pairs = [(seconds(dense_delta), seconds(triplet_delta)) for _ in range(repeats + 3)]
    return median(dense / factored for dense, factored in pairs[3:])
