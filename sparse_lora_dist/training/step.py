"""Make one optimizer step, and sum losses and scores over the held-out data.

Suffixes of names are shapes: M is the number of rows of a micro-batch, T the number of tokens of
its longest row after padding.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparse_lora_dist.adapter.dropout import RowSeeds
from sparse_lora_dist.data import MicroBatch
from sparse_lora_dist.distributed import comm
from sparse_lora_dist.methods.protocol.method import Decision
from sparse_lora_dist.runtime import stop_signals, watchdog
from sparse_lora_dist.sparsity.decisions import Decisions
from sparse_lora_dist.sparsity.shards import Shards
from sparse_lora_dist.zero3.engine import Engine


@dataclass(frozen=True, kw_only=True, slots=True)
class StepResult:
    """Result of one optimizer step; the same on every rank."""

    loss: float
    """Mean loss before the update, in nats per target (a token, or an example of a classifier)."""
    applied: bool
    """False if the loss or the gradient of any rank was not finite, so that nothing was updated."""
    tokens: int
    """Number of tokens that went through the model on all ranks, without padding."""
    decision: Decision | None
    """What the method (``--method``) changed at this step: which entries are trained from here on,
    which were set to zero, and the rank of each adapter. None if no decision was due."""


def train_step(
    engine: Engine,
    shards: Shards,
    decisions: Decisions,
    batches: Sequence[MicroBatch],
    row_seeds: RowSeeds,
    *,
    step: int,
    loss_of: Callable[[Engine, Any], Tensor],
) -> StepResult:
    """Make one optimizer step. Collective.

    Each micro-batch goes through forward and backward. Then the method makes its decision if one is
    due (it chooses which entries are trained, which are set to zero, and the rank of each adapter),
    and the optimizer updates the trained tensors. If the loss or a gradient is not finite, nothing
    is updated.

    The loss is the mean over all targets of the step, on all ranks and in all micro-batches. A
    target is what has a loss: a token, or an example of a classifier.
    DeepSpeed averages gradients over ranks and micro-batches, so the summed loss of a micro-batch,
    ``loss_of(engine, batch)``, is multiplied by (ranks x micro-batches) / targets.

    Args:
        engine: the DeepSpeed engine.
        shards: this rank's shards of the trained tensors.
        decisions: object that makes the decision of the method, and checks after the update that
            all ranks have the same.
        batches: this rank's micro-batches of the step; as many on every rank.
        row_seeds: object from which dropout takes its seeds. This function sets its step, and the
            rows of each micro-batch.
        step: number of the optimizer step, counted from 1.
        loss_of: function of (engine, micro-batch) that returns the summed loss in nats, a scalar
            with a gradient.

    Returns:
        Loss, number of tokens and decision of the step, the same on every rank.

    Raises:
        Stopped: the run was asked to stop, before one of the micro-batches.
    """
    counts = torch.tensor(
        [[b.num_targets, sum(b.lengths_M)] for b in batches], device=comm.device()
    ).sum(dim=0)
    num_targets, num_tokens = (int(n) for n in comm.sum_over_ranks(counts))
    scale = comm.world_size() * len(batches) / max(num_targets, 1)
    loss_sum = torch.zeros((), dtype=torch.float64, device=comm.device())

    row_seeds.step = step
    total, is_finite, decision = 0.0, True, None
    for i, batch in enumerate(batches):
        stop_signals.check()  # what was accumulated is then left: the step is done again whole
        watchdog.set_phase("forward")
        row_seeds.begin(batch.rows_M, batch.lengths_M, num_positions=batch.input_ids_MT.shape[1])
        loss = loss_of(engine, batch)
        watchdog.set_phase("backward")
        engine.backward(loss * scale)
        loss_sum += loss.detach()
        if i == len(batches) - 1:
            watchdog.set_phase("decision and update")
            # Gradients are reduced and sharded from here until engine.step().
            sums = comm.sum_over_ranks(torch.stack([loss_sum, engine.gradient_is_finite()]))
            total, is_finite = float(sums[0]), bool(sums.isfinite().all())
            if is_finite:
                shards.observe(step)
            decision = decisions.make(step)
        engine.step(refuse=not is_finite)
    if not is_finite:
        shards.skip_step()
    decisions.confirm(step)
    loss_of_step = total / max(num_targets, 1)
    return StepResult(loss=loss_of_step, applied=is_finite, tokens=num_tokens, decision=decision)


def held_out_totals(
    engine: Engine, batches: Iterable[MicroBatch], tally: Callable[[Engine, Any], Tensor]
) -> Tensor:
    """Return the sum of ``tally`` over the held-out micro-batches of all ranks. Collective.

    Args:
        engine: the DeepSpeed engine.
        batches: this rank's held-out micro-batches; as many on every rank.
        tally: function of (engine, micro-batch) that returns a vector of sums over the
            micro-batch. Which sums (of losses, hits, targets ...) depends on the task.

    Returns:
        The vector of totals, with the same entries as a result of ``tally``; the same on every
        rank.

    Raises:
        Stopped: the run was asked to stop, before one of the batches.
    """
    tallies = []
    with engine.evaluating():
        for batch in batches:
            stop_signals.check()
            watchdog.set_phase("held-out loss")  # a batch is progress, even without a collective
            tallies.append(tally(engine, batch))
    totals = torch.stack(tallies).sum(dim=0)
    return comm.sum_over_ranks(totals)
