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
    # Schedulers count finished steps. In a warm-up from 0 the first step would do nothing: it gets
    # the next value.
    first = 1 if warmup_steps > 0 else 0
    return lambda step: peak * factor(step - 1 + first)
