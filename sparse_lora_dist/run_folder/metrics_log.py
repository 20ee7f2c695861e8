"""What a run tells: one JSON line per logged step, TensorBoard and W&B beside it, a progress bar,
memory."""

import json
import math
import resource
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from sparse_lora_dist.distributed import comm
from sparse_lora_dist.distributed.console import print_line
from sparse_lora_dist.errors import UserError
from sparse_lora_dist.system.atomic_files import write_whole

Record = Mapping[str, float | int | str]


def own_peak_memory_bytes() -> int:
    """Peak of this rank: allocated on its GPU, else resident in its process. Not a collective."""
    if comm.on_gpu():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def peak_memory_bytes() -> int:
    """Largest peak of any rank. Collective."""
    peak = torch.tensor(own_peak_memory_bytes(), device=comm.device())
    return int(comm.max_over_ranks(peak))


class JsonLines:
    """A file of one JSON object a line, each with its ``step``. Only rank 0 writes."""

    def __init__(self, path: Path, *, last_step: int | None) -> None:
        """Forgets what stands after ``last_step``, where a resumed run goes on; None: all of it."""
        self.path, self._failed = path, False
        if comm.rank() == 0 and path.exists():
            rows = [
                r for r in read_records(path) if last_step is not None and r["step"] <= last_step
            ]
            write_whole(path, "".join(json.dumps(row) + "\n" for row in rows))

    def append(self, row: Mapping[str, Any]) -> None:
        """Add one; numbers that JSON does not have are null. A disk that takes no more is told of
        once: what a run cannot do without are checkpoints, and they end it."""
        if comm.rank() > 0 or self._failed:
            return
        finite = {k: v if _has_json(v) else None for k, v in row.items()}
        try:
            with self.path.open("a") as file:
                file.write(json.dumps(finite) + "\n")
        except OSError as error:
            self._failed = True
            print_line(
                "warning", f"{error}: {self.path.name} has no rows from step {row['step']} on"
            )


def _has_json(value: object) -> bool:
    return not isinstance(value, float) or math.isfinite(value)


class Metrics:
    """Where rows of numbers go. Only rank 0 writes; the others' calls do nothing."""

    def __init__(
        self,
        folder: Path,
        trackers: Sequence[str],
        config: Mapping[str, object],
        *,
        last_step: int | None,
        run_ids: Mapping[str, str],
    ) -> None:
        """Forgets what stands after ``last_step``, where a resumed run goes on; None: all of it.
        ``run_ids`` of its trackers go on too."""
        self.writes = comm.rank() == 0
        self._lines = JsonLines(folder / "metrics.jsonl", last_step=last_step)
        self.path = self._lines.path
        self._tensorboard: Any = None
        self._wandb: Any = None
        if self.writes and "tensorboard" in trackers:
            from torch.utils.tensorboard import SummaryWriter

            purge = 0 if last_step is None else last_step + 1
            self._tensorboard = SummaryWriter(str(folder / "tensorboard"), purge_step=purge)
        if self.writes and "wandb" in trackers:
            self._wandb = _start_wandb(folder, config, run_ids.get("wandb"))

    @property
    def run_ids(self) -> dict[str, str]:
        """By which trackers know this run, for a checkpoint; on rank 0."""
        return {} if self._wandb is None else {"wandb": self._wandb.id}

    def log(self, row: Record) -> None:
        """Append one row; ``step`` is its x axis."""
        self._lines.append(row)
        numbers = {k: v for k, v in row.items() if k != "step" and not isinstance(v, str)}
        if self._tensorboard is not None:
            for name, value in numbers.items():
                self._tensorboard.add_scalar(name, value, int(row["step"]))
        if self._wandb is not None:
            self._wandb.log(numbers, step=int(row["step"]))

    def log_sites(self, step: int, numbers: Mapping[str, Mapping[str, int]]) -> None:
        """What a decision left of every site, by name of the number: histograms of TensorBoard,
        whose scalars would be thousands. W&B has the scalars of ``log`` only."""
        if self._tensorboard is not None:
            for name, sites in numbers.items():
                self._tensorboard.add_histogram(
                    f"sites/{name}", torch.tensor([*sites.values()]), step
                )

    def close(self) -> None:
        """Flush what the trackers hold."""
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


def read_records(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics file; a last line that a crash cut short is left out."""
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def _start_wandb(folder: Path, config: Mapping[str, object], run_id: str | None) -> Any:
    try:
        import wandb
    except ImportError as error:
        raise UserError(
            "--trackers wandb needs the package: pip install 'sparse_lora_dist[wandb]'"
        ) from error
    return wandb.init(
        dir=str(folder),
        config=dict(config),
        name=folder.name,
        id=run_id,
        resume="allow",
        settings=wandb.Settings(silent=True),
    )
