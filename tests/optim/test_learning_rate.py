"""The learning rate is transformers' schedule, as a pure function of the step and the birth."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from transformers import get_scheduler

from sparse_lora_dist.config.config import Config
from sparse_lora_dist.config.sections import TrainConfig
from sparse_lora_dist.methods import METHODS, RunContext
from sparse_lora_dist.methods.protocol.form import Site
from sparse_lora_dist.optim.learning_rate import LearningRate
from sparse_lora_dist.training.job import _learning_rate


def rates(name: str, total_steps: int, *, warmup_steps: int = 0, **options: object) -> LearningRate:
    usual = {"peak": 1.0, "stages": (total_steps,)}
    return LearningRate(name=name, warmup_steps=warmup_steps, **usual | options)


@pytest.mark.parametrize("name", ["constant", "linear", "cosine"])
def test_without_warmup_it_is_transformers_own(name: str) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
    scheduler = get_scheduler(name, optimizer, num_warmup_steps=0, num_training_steps=10)
    rate = rates(name, 10, peak=0.1)
    for step in range(1, 11):
        assert rate.at(step) == pytest.approx(scheduler.get_last_lr()[0], rel=1e-12)
        optimizer.step()
        scheduler.step()


def test_no_step_of_a_run_has_rate_zero() -> None:
    rate = rates("linear", 10, warmup_steps=4)
    seen = [rate.at(step) for step in range(1, 11)]
    assert seen[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert seen[-1] == pytest.approx(1 / 6)
    assert all(later < earlier for earlier, later in zip(seen[4:], seen[5:], strict=False))


@pytest.mark.parametrize("name", ["linear", "cosine", "constant_with_warmup"])
def test_a_run_of_warmup_alone_ends_at_the_peak(name: str) -> None:
    for steps in (1, 3, 5):
        rate = rates(name, steps, warmup_steps=steps)
        seen = [rate.at(step) for step in range(1, steps + 1)]
        assert seen == pytest.approx([step / steps for step in range(1, steps + 1)])


def test_a_newborn_entry_warms_up_from_its_birth() -> None:
    rate = rates("constant", 20, newborn_warmup=4)
    assert [rate.at(s, born=6) for s in range(7, 13)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert [rate.at(s) for s in range(7, 13)] == [1.0] * 6


@pytest.mark.parametrize("name", ["linear", "constant"])
def test_a_restarted_schedule_begins_at_the_birth_and_ends_with_the_run(name: str) -> None:
    rate = rates(name, 20, warmup_steps=2, newborn_warmup=4, newborn_restarts=True)
    seen = [rate.at(step, born=6) for step in range(7, 21)]
    assert seen[:4] == [0.25, 0.5, 0.75, 1.0]
    # n(7), the first after the warm-up, down to 0 one step after the last: as for the run itself.
    down = [1 - k / 10 for k in range(10)]
    assert seen[4:] == pytest.approx(down if name == "linear" else [1.0] * 10)


def test_each_stage_sees_the_whole_schedule() -> None:
    rate, one = rates("linear", 0, stages=(10, 20), warmup_steps=2), rates("linear", 10)
    seen = [rate.at(step) for step in range(1, 21)]
    assert seen[:10] == seen[10:]
    assert seen[9] < seen[10] * 0.3 or one.at(1) == 1.0
    first_only = rates("linear", 0, stages=(10, 20), first_stage_only=True)
    assert all(first_only.at(s) > 0 for s in range(1, 11))
    assert all(first_only.at(s) == 0 for s in range(11, 21))


def test_who_was_born_in_an_earlier_stage_is_no_newborn_in_this() -> None:
    rate = rates("constant", 0, stages=(10, 20), newborn_warmup=5)
    assert rate.at(11, born=10) == rate.at(11, born=0) == 1.0
    assert rate.at(10, born=9) == pytest.approx(0.2)


# --- what a job makes of its options and its method ---------------------------------------------

STEPS, WARMUP = 40, 3


def rate_of_a_job(method: str, **options: Any) -> LearningRate:
    train = TrainConfig(
        max_steps=STEPS, learning_rate=0.5, lr_schedule="linear", warmup_steps=WARMUP
    )
    sites = tuple(Site(name=f"m.{i}", in_features=60, out_features=40, rank=8) for i in range(4))
    plan = RunContext(total_steps=STEPS, warmup_steps=WARMUP, learning_rate=0.5, sites=sites)
    factory = METHODS[method]
    record = factory.build(factory.options(**options), plan)
    return _learning_rate(Config(train=train), record, STEPS)


def schedule(warmup: int, steps: int) -> list[float]:
    """Up to 0.5 in ``warmup`` steps, then down to 0 one step after the last."""
    up = [(k + 1) / warmup for k in range(warmup)]
    return [0.5 * x for x in up + [1 - k / (steps - warmup) for k in range(steps - warmup)]]


def seen(rate: LearningRate, born: int) -> list[float]:
    return [rate.at(step, born) for step in range(born + 1, STEPS + 1)]


@pytest.mark.parametrize("born", [8, 20, 30])
def test_what_increlora_opens_warms_up_at_its_birth_and_decays_to_the_runs_end(born: int) -> None:
    rate = rate_of_a_job("increlora", increlora_every=5)
    assert seen(rate, born) == pytest.approx(schedule(5, STEPS - born))
    shorter = rate_of_a_job("increlora", increlora_every=5, increlora_warmup=2)
    assert seen(shorter, born) == pytest.approx(schedule(2, STEPS - born))


@pytest.mark.parametrize("method", ["roselora", "adalora"])
def test_what_comes_to_life_under_other_methods_warms_up_like_the_run_and_goes_on_with_it(
    method: str,
) -> None:
    rate = rate_of_a_job(method)
    ramp = [1 / WARMUP, 2 / WARMUP] + [1.0] * (STEPS - 12)
    of_run = schedule(WARMUP, STEPS)[10:]
    assert seen(rate, 10) == pytest.approx([r * f for r, f in zip(of_run, ramp, strict=True)])


@pytest.mark.parametrize(
    ("method", "options"), [("shira", {"shira_support": "gradient"}), ("sara", {}), ("losa", {})]
)
def test_moments_that_start_anew_leave_the_rate_as_it_was(
    method: str, options: dict[str, Any]
) -> None:
    rate = rate_of_a_job(method, **options)
    assert seen(rate, 10) == pytest.approx(schedule(WARMUP, STEPS)[10:])


@pytest.mark.parametrize("method", METHODS)
def test_what_lives_from_the_start_is_on_the_schedule_of_each_stage(method: str) -> None:
    rate = rate_of_a_job(method)
    stages = [end - start for start, end in pairwise((0, *rate.stages))]
    wanted = [x for steps in stages for x in schedule(WARMUP, steps)]
    assert seen(rate, 0) == pytest.approx(wanted) and len(wanted) == STEPS
