"""What the workers of ``tests/ranks.py`` run for the tests of classifiers."""

from typing import Any

import torch
from torch import Tensor

from sparse_lora_dist.data import LabelledBatch
from tests.run_work import finished_job


def trained_logits(flags: list[str]) -> tuple[list[LabelledBatch], Tensor]:
    """Train, then this rank's held-out batches and what the engine says to the first."""
    job = finished_job(flags)
    batches: list[Any] = list(job.feed.held_out_batches(1))
    with job.engine.evaluating():
        return batches, job.engine(**batches[0].inputs("cpu")).logits.float()


def random_state_after(flags: list[str]) -> Tensor:
    """Train; the state of torch's own generator, which nothing in a run may draw from."""
    torch.manual_seed(1)
    finished_job(flags)
    return torch.get_rng_state()
