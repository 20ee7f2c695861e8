"""Bad steps: steps without a finite loss and gradient, and loss spikes. They are printed and
logged; too many non-finite ones in a row end the run."""

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

WINDOW = 50
"""Number of last losses that a spike is measured against."""
ENOUGH = 20
"""Fewest losses that a spike is measured against."""
DEVIATIONS = 6.0
"""Standard deviations above the mean that make a spike. Losses of batches differ by 1 to 2."""


class Health:
    """Writer of ``bad_steps.jsonl``, which also ends a run that has bad steps only."""

    def __init__(self, folder: Path, max_bad_steps: int, *, last_step: int | None) -> None:
        self._lines = JsonLines(folder / "bad_steps.jsonl", last_step=last_step)
        self._most, self._in_a_row = max_bad_steps, 0
        self._losses: deque[float] = deque(maxlen=WINDOW)

    def after_step(self, step: int, result: StepResult, batches: Sequence[MicroBatch]) -> None:
        """Look at the result of a step. Collective.

        Args:
            step: the optimizer step, counted from 1.
            result: what the step did.
            batches: this rank's micro-batches of the step, whose row numbers are logged.

        Raises:
            UserError: too many steps in a row had no finite loss and gradient.
        """
        if result.applied:
            self._in_a_row = 0
            self._look_for_a_spike(step, result.loss, batches)
            return
        self._in_a_row += 1
        has_loss = math.isfinite(result.loss)
        what = "a non-finite gradient" if has_loss else f"loss {result.loss}"
        print_line("bad step", f"{step} had {what}: left out, {self._in_a_row} in a row")
        self._write(step, "left out", result.loss, batches)
        if self._in_a_row >= self._most:
            raise UserError(
                f"{counted(self._in_a_row, 'step')} in a row had a loss or gradient that is not "
                f"finite (--max_bad_steps {self._most}). They updated nothing, and "
                f"{self._lines.path} lists their rows. Lower --learning_rate or check the data, "
                "then continue with --resume auto.",
                shared=True,
            )

    def _look_for_a_spike(self, step: int, loss: float, batches: Sequence[MicroBatch]) -> None:
        if len(self._losses) >= ENOUGH:
            mean, deviation = statistics.mean(self._losses), statistics.stdev(self._losses)
            if loss > mean + DEVIATIONS * deviation:
                last = f"mean of the last {len(self._losses)} is {mean:.4f} +- {deviation:.4f}"
                print_line("spike", f"loss {loss:.4f} at step {step}; {last}")
                self._write(step, "spike", loss, batches)
        self._losses.append(loss)

    def _write(self, step: int, kind: str, loss: float, batches: Sequence[MicroBatch]) -> None:
        own = [row for batch in batches for row in batch.rows_M if row >= 0]
        rows = [row for part in comm.gather_objects(own) for row in part]
        self._lines.append({"step": step, "kind": kind, "loss": loss, "rows": sorted(rows)})
