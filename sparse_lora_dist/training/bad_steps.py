"""Steps whose numbers are of no use or out of the ordinary: said, written down, and no more than so
many in a row."""

import math
import statistics
from collections import deque
from collections.abc import Sequence
from pathlib import Path

from sparse_lora_dist.data import MicroBatch
from sparse_lora_dist.distributed import comm
from sparse_lora_dist.distributed.console import counted, print_line
from sparse_lora_dist.errors import UserError
from sparse_lora_dist.run_folder.metrics_file import JsonLines
from sparse_lora_dist.training.step import StepResult

WINDOW, ENOUGH = 50, 20
"""Losses that a spike is measured against: the last so many, once there are enough."""
DEVIATIONS = 6.0
"""Standard deviations above their mean that make a spike. Batches differ by 1 to 2."""


class Health:
    """``bad_steps.jsonl`` of a run folder, and the end of a run that only has bad steps."""

    def __init__(self, folder: Path, max_bad_steps: int, *, last_step: int | None) -> None:
        self._lines = JsonLines(folder / "bad_steps.jsonl", last_step=last_step)
        self._most, self._in_a_row = max_bad_steps, 0
        self._losses: deque[float] = deque(maxlen=WINDOW)

    def after_step(self, step: int, result: StepResult, batches: Sequence[MicroBatch]) -> None:
        """Collective.

        Raises:
            UserError: too many steps in a row had no finite loss and gradient.
        """
        if result.applied:
            self._in_a_row = 0
            self._look_for_a_spike(step, result.loss, batches)
            return
        self._in_a_row += 1
        what = f"loss {result.loss}" if not math.isfinite(result.loss) else "a gradient of nan"
        print_line("bad step", f"{step} had {what}: left out, {self._in_a_row} in a row")
        self._write(step, "left out", result.loss, batches)
        if self._in_a_row >= self._most:
            raise UserError(
                f"{counted(self._in_a_row, 'step')} in a row had a loss or gradient that is not "
                f"finite (--max_bad_steps {self._most}); nothing was updated by them, and "
                f"{self._lines.path} has their rows. Lower --learning_rate, or look at the data, "
                "and go on with --resume auto.",
                shared=True,
            )

    def _look_for_a_spike(self, step: int, loss: float, batches: Sequence[MicroBatch]) -> None:
        if len(self._losses) >= ENOUGH:
            mean, deviation = statistics.mean(self._losses), statistics.stdev(self._losses)
            if loss > mean + DEVIATIONS * deviation:
                last = f"the last {len(self._losses)} steps had {mean:.4f} +- {deviation:.4f}"
                print_line("spike", f"loss {loss:.4f} at step {step}; {last}")
                self._write(step, "spike", loss, batches)
        self._losses.append(loss)

    def _write(self, step: int, kind: str, loss: float, batches: Sequence[MicroBatch]) -> None:
        own = [row for batch in batches for row in batch.rows_M if row >= 0]
        rows = [row for part in comm.gather_objects(own) for row in part]
        self._lines.append({"step": step, "kind": kind, "loss": loss, "rows": sorted(rows)})
