"""Record a run's decisions and stages, and measure the memory and traffic that sparsity costs.

A decision is what the method (``--method``) changes at a step: which entries are trained, which are
set to zero, and the rank of each adapter. A stage is a part of the run with a learning-rate
schedule of its own. Most methods have no stages, and then ``stages.jsonl`` is not written.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from sparse_lora_dist.distributed import comm
from sparse_lora_dist.methods.protocol.method import Decision
from sparse_lora_dist.optim.learning_rate import LearningRate, stage_of
from sparse_lora_dist.run_folder.metrics_file import JsonLines, read_records
from sparse_lora_dist.sparsity.shards import Shards


class Journal:
    """Appends records (one JSON object per line) to ``decisions.jsonl`` and ``stages.jsonl`` of a
    run folder."""

    def __init__(self, folder: Path, *, last_step: int | None, last_stage: int | None) -> None:
        """Open both files, and remove the records that a resumed run makes again.

        Args:
            folder: the run folder.
            last_step: decisions of later optimizer steps than this one are removed; None removes
                all.
            last_stage: stages that ended after this optimizer step are removed; None removes all.
        """
        self._decisions = JsonLines(folder / "decisions.jsonl", last_step=last_step)
        self._stages = JsonLines(folder / "stages.jsonl", last_step=last_stage)

    def decision(
        self, step: int, decision: Decision, shards: Shards
    ) -> Mapping[str, Mapping[str, int]]:
        """Append the record of a decision. Collective.

        Args:
            step: optimizer step of the decision.
            decision: what the method changed; its log values are recorded.
            shards: this rank's shards of the trained tensors, after the decision.

        Returns:
            A dict with the keys "ranks" and "live". Each value is a dict from the name of a site
            (target module): for "ranks" to the rank of its adapter, for "live" to its number of
            live entries, which are those that the optimizer updates.
        """
        sites = {"ranks": shards.sites.ranks(), "live": live_per_site(shards)}
        self._decisions.append({"step": step, **decision.log_values, **sites})
        return sites

    def stage(
        self, step: int, rate: LearningRate, metrics: Path, results: Mapping[str, float | None]
    ) -> None:
        """Append the record of the stage that ended at ``step``. Not a collective.

        Args:
            step: last optimizer step of the stage.
            rate: learning-rate schedule; its mean over the steps of the stage is recorded.
            metrics: path of ``metrics.jsonl``; the mean of the losses logged in the stage is
                recorded.
            results: further numbers to record, measured at the end of the stage, by name.
        """
        start, _ = stage_of(step, rate.stages)
        rows = read_records(metrics) if comm.rank() == 0 else []
        losses = [
            r["loss"]
            for r in rows
            if start < r["step"] <= step and isinstance(r.get("loss"), int | float)
        ]
        rates = [rate.at(s) for s in range(start + 1, step + 1)]
        self._stages.append(
            {
                "step": step,
                "stage": rate.stages.index(step) + 1,
                "learning_rate": sum(rates) / len(rates),
                "loss": sum(losses) / max(len(losses), 1),
                **results,
            }
        )


def live_per_site(shards: Shards) -> dict[str, int]:
    """Return the number of live entries (those that the optimizer updates) of each site (target
    module), summed over all ranks, by the name of the site. Collective: one all-reduce."""
    places = {site: place for place, site in enumerate(shards.sites.adapters)}
    live = {name: mask for name, mask in shards.live().items() if name in shards.sparse}
    own = torch.zeros(len(places), dtype=torch.int64, device=comm.device())
    if live:
        sums = torch.stack([mask.sum() for mask in live.values()]).to(own.device)
        site_of = [places[name.rpartition(".")[0]] for name in live]
        own.index_add_(0, torch.tensor(site_of, device=own.device), sums)
    return dict(zip(places, comm.sum_over_ranks(own).tolist(), strict=True))


def memory_and_traffic(shards: Shards) -> dict[str, int]:
    """Measure the memory and traffic that sparsity costs, in bytes. Collective: one all-reduce.

    Returns:
        Bytes by name, each the largest value of any rank. ``state_bytes``, ``state_bytes_peak`` and
        ``state_bytes_repacking``: the optimizer state now, at its peak, and while it is repacked
        after a decision. ``statistics_bytes``: running statistics from which the method decides.
        ``decision_bytes_received``: what one rank has received from the others for statistics and
        decisions since the program started.
    """
    state = shards.optimizer.state_bytes()
    own: dict[str, Any] = {
        "state_bytes": state.now,
        "state_bytes_peak": state.peak,
        "state_bytes_repacking": state.repacking,
        "statistics_bytes": shards.statistics_bytes(),
        "decision_bytes_received": shards.traffic_bytes,
    }
    most = comm.max_over_ranks(torch.tensor(list(own.values()), device=comm.device()))
    return dict(zip(own, most.tolist(), strict=True))
