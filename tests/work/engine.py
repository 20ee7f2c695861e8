"""What workers run for ``test_ds_configs.py`` and ``test_reference.py``: whole jobs, watched."""

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from deepspeed.runtime.zero import partition_parameters
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sparse_lora_dist import train as program
from sparse_lora_dist.data import Batch
from sparse_lora_dist.distributed import comm
from sparse_lora_dist.sparsity.shards import Shards
from sparse_lora_dist.training.step import train_step
from tests.work.run import train


def train_counting_gathers(flags: list[str]) -> Counter[int]:
    """The main job; {ranks in the group: parameter gathers}."""
    sizes: Counter[int] = Counter()
    usual = partition_parameters._dist_allgather_fn

    def counted(own: Any, out: Any, group: Any = None) -> Any:
        sizes[dist.get_world_size(group)] += 1
        return usual(own, out, group)

    with patch.object(partition_parameters, "_dist_allgather_fn", counted):
        train(flags)
    return sizes


@dataclass
class FirstStep:
    """What a job of one step saw on this rank."""

    loss: float
    batches: list[Batch]
    gradients: dict[str, Tensor]
    """Whole, of every trained tensor, before clipping."""


def first_step(flags: list[str]) -> FirstStep:
    """The main job, listened to at the accumulation boundary of its only step."""
    seen = FirstStep(loss=math.nan, batches=[], gradients={})

    def watched_step(
        engine: Any, shards: Shards, decisions: Any, batches: list[Batch], *args: Any, **rest: Any
    ) -> Any:
        seen.batches += batches
        result = train_step(engine, shards, decisions, batches, *args, **rest)
        seen.loss = result.loss
        return result

    def observe(shards: Shards, step: int) -> None:
        for component in shards.engine.slices:
            padded = torch.zeros(component.share)
            padded[: component.length] = shards.engine.gradient(component)
            whole = comm.all_gather_flat(padded, component.numel)
            seen.gradients[component.name] = whole.view(component.shape)

    with (
        patch.object(program, "train_step", watched_step),
        patch.object(Shards, "observe", observe),
    ):
        train(flags)
    return seen


class _Matmuls(TorchDispatchMode):
    """Sees the shapes of all matmuls."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.shapes: Counter[tuple[torch.Size, torch.Size]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.mm.default:
            self.shapes[args[0].shape, args[1].shape] += 1
        return func(*args, **(kwargs or {}))


def shapes_of_matmuls(flags: list[str]) -> Counter[tuple[torch.Size, torch.Size]]:
    """The main job; {shapes of the two operands of a matmul: how often}."""
    with _Matmuls() as seen:
        train(flags)
    return seen.shapes
