"""Compute the learning rate of a step, with the schedules of transformers.

An entry of a tensor is live while the optimizer steps it. Methods may make entries live during the
run; an entry's birth step is the number of optimizer steps that were done when it became live. Its
learning rate depends on the birth step as well. ``LearningRate`` has no state, so checkpoints do
not contain it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from transformers import get_scheduler


@dataclass(frozen=True, kw_only=True, slots=True)
class LearningRate:
    """Learning-rate schedule of a run: a rate for each step and each birth step of entries.

    The birth step of an entry of a tensor is the number of optimizer steps done when the optimizer
    began to step it. A run consists of one or more stages, and each stage runs through the whole
    schedule, from warm-up to decay.
    """

    name: str
    """Schedule, by its name in transformers: "linear", "cosine", "constant_with_warmup" ..."""
    peak: float
    """Learning rate after warm-up."""
    warmup_steps: int
    """Warm-up steps at the start of each stage."""
    stages: tuple[int, ...]
    """Last step of each stage, ascending. The last stage ends with the run."""
    first_stage_only: bool = False
    """True: the learning rate is 0 in all stages but the first."""
    newborn_warmup: int = 0
    """Number of warm-up steps of an entry that becomes live within a stage."""
    newborn_restarts: bool = False
    """True: an entry that becomes live within a stage gets a whole schedule of its own, from its
    birth step to the end of the stage. False: only a warm-up of its own."""

    def at(self, step: int, born: int = 0) -> float:
        """Return the learning rate of a step for entries of one birth step.

        Entries that were live when the stage began have the stage's rate. An entry that becomes
        live within a stage warms up on its own: its rate is the stage's, times a linear ramp over
        ``newborn_warmup`` steps. With ``newborn_restarts`` its rate is instead that of a schedule
        that begins at its birth step and ends with the stage (IncreLoRA, arXiv:2308.12043, "restart
        warm-up").

        Args:
            step: optimizer step, counted from 1.
            born: birth step: the number of optimizer steps done when the entries became live.
        """
        start, end = stage_of(step, self.stages)
        if self.first_stage_only and start > 0:
            return 0.0
        if born > start and self.newborn_restarts:
            name = "constant_with_warmup" if self.name == "constant" else self.name
            warmup = min(self.newborn_warmup, end - born)
            return self.peak * _factor(name, warmup, end - born, step - born)
        rate = self.peak * _factor(self.name, self.warmup_steps, end - start, step - start)
        if born > start and step - born < self.newborn_warmup:
            rate *= (step - born) / self.newborn_warmup
        return rate


def stage_of(step: int, stages: tuple[int, ...]) -> tuple[int, int]:
    """Return the bounds of the stage that contains a step.

    A stage is a part of the run with a whole learning-rate schedule of its own.

    Args:
        step: optimizer step, counted from 1.
        stages: last step of each stage, ascending.

    Returns:
        (last step before the stage, last step of the stage). The former is 0 for the first stage.

    Raises:
        ValueError: the step is beyond the last stage.
    """
    start = 0
    for end in stages:
        if step <= end:
            return start, end
        start = end
    raise ValueError(f"Step {step} is beyond the last stage, which ends at step {start}.")


def _factor(name: str, warmup_steps: int, total_steps: int, step: int) -> float:
    # A schedule f counts finished steps, so step t would get f(t - 1), and step 1 of the warm-up
    # f(0) = 0. During warm-up step t gets f(t) instead. After it step t does get f(t - 1): with
    # f(t) the last step would have rate 0. Linear, with 2 warm-up steps of 4:
    #     step 1: f(1) = 0.5    step 2: f(2) = 1.0    step 3: f(2) = 1.0    step 4: f(3) = 0.5
    # If all steps are warm-up, the schedule is that of one more: the last one has the whole rate.
    total = max(total_steps, warmup_steps + 1)
    return _schedule(name, warmup_steps, total)(step if step <= warmup_steps else step - 1)


@cache
def _schedule(name: str, warmup_steps: int, total_steps: int) -> Callable[[int], float]:
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    scheduler = get_scheduler(
        name, optimizer, num_warmup_steps=warmup_steps, num_training_steps=total_steps
    )
    factor: Callable[[int], float] = scheduler.lr_lambdas[0]
    return factor
