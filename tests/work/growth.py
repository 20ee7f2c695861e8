"""A whole job, watched at every step: what workers run for ``test_growth_runs.py``,
``test_sora.py`` and ``test_reference.py``."""

from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from sparse_lora_dist import train as program
from sparse_lora_dist.data import Batch
from sparse_lora_dist.training.step import StepResult, train_step
from sparse_lora_dist.zero3.engine import Engine
from tests.work.run import train


@dataclass
class Watched:
    """What one rank saw of a run."""

    said: str = ""
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    masters: list[dict[str, Tensor]] = field(default_factory=list)
    """Before the first step and after each: this rank's part of every trained tensor, flat."""
    batches: list[list[Batch]] = field(default_factory=list)
    """Of each step."""
    losses: list[float] = field(default_factory=list)


def watch(flags: list[str]) -> Watched:
    """The main job."""
    seen = Watched()

    def watched_step(
        engine: Engine, shards: Any, decisions: Any, batches: list[Batch], *args: Any, **rest: Any
    ) -> StepResult:
        def masters() -> dict[str, Tensor]:
            return {component.name: engine.master(component).clone() for component in engine.slices}

        if not seen.masters:
            seen.shapes = {component.name: component.shape for component in engine.slices}
            seen.masters.append(masters())
        result = train_step(engine, shards, decisions, batches, *args, **rest)
        seen.masters.append(masters())
        seen.batches.append(batches)
        seen.losses.append(result.loss)
        return result

    with patch.object(program, "train_step", watched_step):
        seen.said = train(flags)
    return seen


def whole_masters(everyone: list[Watched]) -> list[dict[str, Tensor]]:
    """Before the first step and after each: every trained tensor, from the parts of all ranks."""
    return [
        {
            name: torch.cat([part[name] for part in parts]).view(shape)
            for name, shape in everyone[0].shapes.items()
        }
        for parts in zip(*(rank.masters for rank in everyone), strict=True)
    ]
