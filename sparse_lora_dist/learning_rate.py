"""step -> learning rate, by transformers' schedules. Nothing is kept, so nothing has to be
saved."""

from collections.abc import Callable

import torch
from transformers import get_scheduler


def learning_rate_at(
    name: str, *, peak: float, warmup_steps: int, total_steps: int
) -> Callable[[int], float]:
    """The learning rate of optimizer step 1, 2, ... of ``total_steps``."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=peak)
    scheduler = get_scheduler(
        name, optimizer, num_warmup_steps=warmup_steps, num_training_steps=total_steps
    )
    factor: Callable[[int], float] = scheduler.lr_lambdas[0]
    # Schedulers count finished steps, so step 1 of a warm-up from 0 would do nothing; during it
    # a step gets the next one's value. Later not, or the last step of the run would do nothing.
    return lambda step: peak * factor(step if step <= warmup_steps else step - 1)
