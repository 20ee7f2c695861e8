"""Write ``attempts.jsonl`` of a run folder: one line (a JSON object) when a job begins and one when
it ends. A job is one start of the program; a run that is resumed has several. A job that was killed
has no second line.

    {"event": "begins", "step": 20, "reached": 27, ...}   resumed from step 20; 27 steps were logged
    {"event": "stopped", "step": 31, "why": "SIGTERM", ...}   or "finished"
"""

import sys
import time
from pathlib import Path

from sparse_lora_dist.distributed import comm
from sparse_lora_dist.run_folder.metrics_file import JsonLines, read_records

NAME = "attempts.jsonl"


class Attempts:
    """Appends lines to ``attempts.jsonl``: one when a job begins, and one when it ends.

    Only rank 0 writes; on other ranks the methods do nothing. Not a collective.
    """

    def __init__(self, folder: Path, *, step: int, total_steps: int) -> None:
        """Append the line that records the begin of a job.

        Make this object before ``Metrics``. The last step in metrics.jsonl is read here, and
        ``Metrics`` removes the lines of steps that a resumed run makes again.

        Args:
            folder: the run folder.
            step: number of optimizer steps already made when the job starts; 0 for a new run.
            total_steps: number of optimizer steps of the whole run.
        """
        metrics = folder / "metrics.jsonl"
        rows = read_records(metrics) if comm.rank() == 0 and metrics.exists() else []
        # All lines are kept: a kill loses steps, and this file is the record that it happened.
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
        """Append the line that records the end of the job.

        Args:
            event: "stopped", or "finished" if the run has made all its steps.
            step: last optimizer step that was made.
            why: what stopped the job, e.g. "SIGTERM"; "" if the run is finished.
        """
        self._lines.append({"event": event, "step": step, "time": time.time(), "why": why})
