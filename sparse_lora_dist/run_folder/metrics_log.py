"""The numbers that a run logs: metrics.jsonl, the trackers beside it, and peak memory."""

import resource
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from sparse_lora_dist.distributed import comm
from sparse_lora_dist.run_folder.metrics_file import JsonLines, Record
from sparse_lora_dist.run_folder.trackers import log_histograms, run_id, start_trackers


def own_peak_memory_bytes() -> int:
    """Peak memory of this rank: allocated on its GPU, or resident in its process on CPU. Not a
    collective."""
    if comm.on_gpu():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def peak_memory_bytes() -> int:
    """Largest ``own_peak_memory_bytes`` of all ranks. Collective."""
    peak = torch.tensor(own_peak_memory_bytes(), device=comm.device())
    return int(comm.max_over_ranks(peak))


class Metrics:
    """``metrics.jsonl`` and the trackers of a run.

    Only rank 0 writes; on other ranks the methods do nothing. Not a collective.
    """

    def __init__(
        self,
        folder: Path,
        trackers: Sequence[str],
        config: Mapping[str, object],
        *,
        last_step: int | None,
        run_ids: Mapping[str, str],
    ) -> None:
        """Open the file and start the trackers.

        Args:
            folder: the run folder.
            trackers: names of trackers, of ``config.sections.TRACKERS``.
            config: options of the run, which the trackers show.
            last_step: step that a resumed run starts from, whose later records are removed; None
                for a new run, which removes all.
            run_ids: ``run_ids`` of the run that is resumed, so that trackers go on with it.

        Raises:
            UserError: the package of a tracker is not installed.
        """
        self._lines = JsonLines(folder / "metrics.jsonl", last_step=last_step)
        self.path = self._lines.path
        self._trackers = (
            start_trackers(trackers, folder, config, last_step=last_step, run_ids=run_ids)
            if comm.rank() == 0
            else []
        )

    @property
    def run_ids(self) -> dict[str, str]:
        """Ids by which trackers know this run, by name of the tracker, for a checkpoint. Empty on
        all ranks but rank 0."""
        ids = {tracker.name: run_id(tracker) for tracker in self._trackers}
        return {name: own_id for name, own_id in ids.items() if own_id is not None}

    def log(self, record: Record) -> None:
        """Append one record; the trackers get its numbers at its ``step``."""
        self._lines.append(record)
        numbers = {k: v for k, v in record.items() if k != "step" and not isinstance(v, str)}
        for tracker in self._trackers:
            tracker.log(numbers, step=int(record["step"]))

    def log_sites(self, step: int, numbers: Mapping[str, Mapping[str, int]]) -> None:
        """Log what a decision left of every site, as TensorBoard histograms (a scalar for each site
        would be thousands).

        Args:
            step: optimizer step of the decision.
            numbers: name of the number -> name of the site -> its value.
        """
        tags = {f"sites/{name}": [*sites.values()] for name, sites in numbers.items()}
        log_histograms(self._trackers, step, tags)

    def close(self) -> None:
        """Flush and close the trackers, which may upload for long."""
        for tracker in self._trackers:
            tracker.finish()
