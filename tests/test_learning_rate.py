"""The learning rate is transformers' schedule, as a pure function of the step."""

import pytest
import torch
from transformers import get_scheduler

from sparse_lora_dist.learning_rate import learning_rate_at


@pytest.mark.parametrize("name", ["constant", "linear", "cosine"])
def test_without_warmup_it_is_transformers_own(name: str) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
    scheduler = get_scheduler(name, optimizer, num_warmup_steps=0, num_training_steps=10)
    rate = learning_rate_at(name, peak=0.1, warmup_steps=0, total_steps=10)
    for step in range(1, 11):
        assert rate(step) == pytest.approx(scheduler.get_last_lr()[0], rel=1e-12)
        optimizer.step()
        scheduler.step()


def test_no_step_of_a_run_has_rate_zero() -> None:
    rate = learning_rate_at("linear", peak=1.0, warmup_steps=4, total_steps=10)
    rates = [rate(step) for step in range(1, 11)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates[-1] == pytest.approx(1 / 6)
    assert all(later < earlier for earlier, later in zip(rates[4:], rates[5:], strict=False))
