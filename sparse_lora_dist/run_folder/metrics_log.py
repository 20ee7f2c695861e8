"""Log the numbers of a run to metrics.jsonl and to experiment trackers; measure peak memory."""

import resource
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.tracking import GeneralTracker

from sparse_lora_dist.distributed import comm
from sparse_lora_dist.distributed.console import print_line
from sparse_lora_dist.run_folder.metrics_file import (
    JsonLines,
    Record,
    of_the_same_rows,
    read_records,
)
from sparse_lora_dist.run_folder.trackers import log_histograms, run_id, start_trackers
from sparse_lora_dist.system.own_files import claim


def own_peak_memory_bytes() -> int:
    """Return the largest memory that this rank has used so far, in bytes. Not a collective.

    On a GPU it is what torch had allocated on the device, on CPU the resident memory of the
    process.
    """
    if comm.on_gpu():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def peak_memory_bytes() -> int:
    """Return the largest ``own_peak_memory_bytes`` of all ranks. Collective."""
    peak = torch.tensor(own_peak_memory_bytes(), device=comm.device())
    return int(comm.max_over_ranks(peak))


class Metrics:
    """Logs numbers to ``metrics.jsonl`` and to the experiment trackers of a run.

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
        """Open ``metrics.jsonl`` and start the trackers.

        Args:
            folder: the run folder.
            trackers: names of trackers, each one of ``config.sections.TRACKERS``, e.g. "wandb".
            config: options of the run by name, which the trackers show.
            last_step: step that a resumed run starts from; lines of later steps are removed. None
                for a new run, which removes all lines.
            run_ids: the property ``run_ids`` as saved in the checkpoint that is resumed, with which
                trackers continue the same run; {} for a new run.

        Raises:
            UserError: the package of a tracker is not installed.
        """
        self._lines = JsonLines(folder / "metrics.jsonl", last_step=last_step)
        self.path = self._lines.path
        if comm.rank() == 0 and "tensorboard" in trackers:
            claim(folder, "tensorboard")
        self._trackers = (
            start_trackers(trackers, folder, config, last_step=last_step, run_ids=run_ids)
            if comm.rank() == 0
            else []
        )

    @property
    def run_ids(self) -> dict[str, str]:
        """Dict from the name of a tracker to its id for this run (see ``trackers.run_id``), which
        checkpoints save. {} on all ranks but rank 0."""
        ids = {tracker.name: run_id(tracker) for tracker in self._trackers}
        return {name: own_id for name, own_id in ids.items() if own_id is not None}

    def log(self, record: Record) -> None:
        """Append one line to ``metrics.jsonl``, and send its numbers to the trackers.

        Args:
            record: numbers by name, among them ``step``, the optimizer step.
        """
        self._lines.append(record)
        numbers = {k: v for k, v in record.items() if k != "step" and not isinstance(v, str)}
        step = int(record["step"])
        self._each("log", lambda tracker: tracker.log(numbers, step=step))

    def read(self) -> list[dict[str, Any]] | None:
        """Return the records of ``metrics.jsonl`` whose held-out scores can be compared, on rank 0;
        None if some could not be written."""
        if self._lines.failed:
            return None
        # No file: a checkpoint resumed into another folder with no step left to train.
        return of_the_same_rows(read_records(self.path) if self.path.exists() else [])

    def log_sites(self, step: int, numbers: Mapping[str, Mapping[str, int]]) -> None:
        """Log numbers that each site (target module) has, as TensorBoard histograms over the sites.
        One scalar per site would make thousands of curves. Called after a decision, when the method
        has changed ranks or live entries.

        Args:
            step: optimizer step of the decision.
            numbers: dict from the name of a number ("ranks" or "live") to a dict from the name of a
                site to its value.
        """
        tags = {f"sites/{name}": [*sites.values()] for name, sites in numbers.items()}
        self._each("log", lambda tracker: log_histograms(tracker, step, tags))

    def close(self) -> None:
        """Flush and close the trackers at the end of a job. It may take long, if a tracker
        uploads."""
        self._each("close", lambda tracker: tracker.finish())

    def _each(self, what: str, work: Callable[[GeneralTracker], None]) -> None:
        """Let each tracker do something. One that fails, since its disk is full or its server away,
        is named and left out from then on: a run can do without it."""
        for tracker in [*self._trackers]:
            try:
                work(tracker)
            except Exception as error:  # each tracker has its own kinds
                self._trackers.remove(tracker)
                print_line(
                    "warning",
                    f"the tracker {tracker.name} cannot {what}: {error}. The run goes on without "
                    f"it; all numbers are in {self.path}.",
                )
