"""``attempts.jsonl`` of a run folder: a line where a job begins, one where it ends. A job that was
killed has no second one.

    {"event": "begins", "step": 20, "reached": 27, ...}   goes on from 20; 27 was logged before
    {"event": "stopped", "step": 31, "why": "SIGTERM", ...}   or "finished"
"""

import sys
import time
from pathlib import Path

from sparse_lora_dist.distributed import comm
from sparse_lora_dist.run_folder.metrics_file import JsonLines, read_records

NAME = "attempts.jsonl"


class Attempts:
    """Only rank 0 writes; the others' calls do nothing."""

    def __init__(self, folder: Path, *, step: int, total_steps: int) -> None:
        """Begins from ``step``. To be made before the metrics forget what was logged after it."""
        metrics = folder / "metrics.jsonl"
        rows = read_records(metrics) if comm.rank() == 0 and metrics.exists() else []
        # Steps are lost to a kill; that it happened is not to be.
        self._lines = JsonLines(folder / NAME, last_step=sys.maxsize)
        self._lines.append(
            {
                "event": "begins",
                "step": step,
                "time": time.time(),
                "reached": rows[-1]["step"] if rows else 0,
                "world_size": comm.world_size(),
                "total_steps": total_steps,
            }
        )

    def end(self, event: str, step: int, why: str = "") -> None:
        """The job leaves after ``step``."""
        self._lines.append({"event": event, "step": step, "time": time.time(), "why": why})
