"""What the workers of ``tests/ranks.py`` run for the tests of classifiers."""

from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from sparse_lora_dist import train as program
from sparse_lora_dist.data import LabelledBatch
from sparse_lora_dist.training.step import train_step
from tests.work.run import finished_job


def trained_logits(flags: list[str]) -> tuple[list[LabelledBatch], Tensor]:
    """Train, then this rank's held-out batches and what the engine says to the first."""
    job = finished_job(flags)
    batches: list[Any] = list(job.feed.held_out_batches(1))
    with job.engine.evaluating():
        return batches, job.engine(**batches[0].inputs("cpu")).logits.float()


def draws_of_steps(flags: list[str]) -> list[bool]:
    """Train; did a step draw from torch's own generator, of which every rank has its own?"""
    drew: list[bool] = []

    def watched_step(*args: Any, **rest: Any) -> Any:
        before = torch.get_rng_state()
        result = train_step(*args, **rest)
        drew.append(not torch.equal(torch.get_rng_state(), before))
        return result

    with patch.object(program, "train_step", watched_step):
        finished_job(flags)
    return drew
