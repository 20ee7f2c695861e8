"""(step, birth) -> learning rate, by transformers' schedules. Nothing is kept, so nothing has to be
saved."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from transformers import get_scheduler


@dataclass(frozen=True, kw_only=True, slots=True)
class LearningRate:
    """The learning rate of every step and entry of a run."""

    name: str
    peak: float
    warmup_steps: int
    stages: tuple[int, ...]
    """Last steps of the parts that each see the whole schedule; the last is that of the run."""
    first_stage_only: bool = False
    """The others have rate 0."""
    newborn_warmup: int = 0
    newborn_restarts: bool = False

    def at(self, step: int, born: int = 0) -> float:
        """At optimizer step 1, 2, ..., for entries that came to life after ``born`` steps.

        An entry born within a stage warms up on its own: its rate is the stage's, times a ramp over
        ``newborn_warmup`` steps; or with ``newborn_restarts`` that of a schedule which begins at
        its birth and ends with the stage (IncreLoRA, arXiv:2308.12043, "restart warm-up").
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
    """(steps before the stage that ``step`` belongs to, its last step)."""
    start = 0
    for end in stages:
        if step <= end:
            return start, end
        start = end
    raise ValueError(f"step {step} lies beyond the last stage, which ends at {start}")


def _factor(name: str, warmup_steps: int, total_steps: int, step: int) -> float:
    # Schedulers count finished steps, so step 1 of a warm-up from 0 would do nothing; during it
    # a step gets the next one's value. Later not, or the last step of the run would do nothing.
    return _schedule(name, warmup_steps, total_steps)(step if step <= warmup_steps else step - 1)


@cache
def _schedule(name: str, warmup_steps: int, total_steps: int) -> Callable[[int], float]:
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    scheduler = get_scheduler(
        name, optimizer, num_warmup_steps=warmup_steps, num_training_steps=total_steps
    )
    factor: Callable[[int], float] = scheduler.lr_lambdas[0]
    return factor
