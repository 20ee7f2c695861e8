"""What a run tells of its decisions and stages, and what sparsity costs and saves."""

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
    """``decisions.jsonl`` and ``stages.jsonl`` of a run folder."""

    def __init__(self, folder: Path, *, last_step: int | None, last_stage: int | None) -> None:
        """Forgets decisions after ``last_step``, where a resumed run goes on, and stages that end
        after ``last_stage``; None: all of them."""
        self._decisions = JsonLines(folder / "decisions.jsonl", last_step=last_step)
        self._stages = JsonLines(folder / "stages.jsonl", last_step=last_stage)

    def decision(
        self, step: int, decision: Decision, shards: Shards
    ) -> Mapping[str, Mapping[str, int]]:
        """A row: the method's facts, every site's open components and live entries; the last two
        are returned. Collective."""
        sites = {"ranks": shards.sites.ranks(), "live": live_per_site(shards)}
        self._decisions.append({"step": step, **decision.log_values, **sites})
        return sites

    def stage(
        self, step: int, rate: LearningRate, metrics: Path, results: Mapping[str, float | None]
    ) -> None:
        """A row for the stage that ended at ``step``: means of its rates and of its logged losses,
        and ``results`` at its end."""
        start, _ = stage_of(step, rate.stages)
        rows = read_records(metrics) if comm.rank() == 0 else []
        losses = [
            r["loss"] for r in rows if start < r["step"] <= step and r.get("loss") is not None
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
    """Live entries of every site, over all ranks. One all-reduce."""
    counts = dict.fromkeys(shards.sites.adapters, 0)
    for name, mask in shards.live().items():
        if name in shards.sparse:
            counts[name.rpartition(".")[0]] += int(mask.sum())
    total = comm.sum_over_ranks(torch.tensor(list(counts.values()), device=comm.device()))
    return dict(zip(counts, total.tolist(), strict=True))


def memory_and_traffic(shards: Shards) -> dict[str, int]:
    """Bytes of the optimizer's state and of the statistics, largest of any rank; bytes that rank
    received for decisions so far. One all-reduce."""
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
