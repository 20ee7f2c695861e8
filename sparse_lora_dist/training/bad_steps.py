"""Find bad steps, print them, and log them to ``bad_steps.jsonl``.

A step is bad if its loss or gradient is not finite, or if its loss is far above the losses before
it (a spike). A run ends if too many steps in a row have a loss or gradient that is not finite.
"""

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
"""Number of previous losses that the loss of a step is compared with."""
ENOUGH = 20
"""Fewest losses to compare with. A step with fewer losses before it is not checked for a spike."""
DEVIATIONS = 6.0
"""A loss is a spike if it is more than this many standard deviations above the mean of the losses
before it. Losses of different batches usually lie within 1 to 2 standard deviations."""


class Health:
    """Logs bad steps to ``bad_steps.jsonl``, and ends a run that has too many in a row.

    A step is bad if its loss or gradient is not finite (it then updates nothing), or if its loss is
    far above the losses before it. Only steps of the first kind can end the run.
    """

    def __init__(self, folder: Path, max_bad_steps: int, *, last_step: int | None) -> None:
        """Open the file, and remove the records (one JSON object per line) of the steps that a
        resumed run makes again.

        Args:
            folder: the run folder.
            max_bad_steps: number of steps in a row without a finite loss and gradient that ends the
                run.
            last_step: optimizer step that a resumed run starts from, whose records and those of
                earlier steps are kept; None removes all.
        """
        self._lines = JsonLines(folder / "bad_steps.jsonl", last_step=last_step)
        self._most, self._in_a_row = max_bad_steps, 0
        self._losses: deque[float] = deque(maxlen=WINDOW)

    def after_step(self, step: int, result: StepResult, batches: Sequence[MicroBatch]) -> None:
        """Print and log the step if it is bad, and raise UserError if it is one too many. Called
        after each optimizer step. Collective.

        Args:
            step: number of the optimizer step, counted from 1.
            result: result of the step.
            batches: this rank's micro-batches of the step, whose row numbers are logged.

        Raises:
            UserError: ``max_bad_steps`` steps in a row had a loss or gradient that is not finite;
                on every rank.
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
                "then continue with --resume auto, or from an earlier checkpoint with --resume "
                "FOLDER if the weights had diverged before: then these steps stay bad.",
                shared=True,
            )

    def _look_for_a_spike(self, step: int, loss: float, batches: Sequence[MicroBatch]) -> None:
        if len(self._losses) >= ENOUGH:
            mean, deviation = statistics.mean(self._losses), statistics.stdev(self._losses)
            if loss > mean + DEVIATIONS * deviation:
                last = f"mean of the last {len(self._losses)} losses: {mean:.4f} +- {deviation:.4f}"
                print_line("spike", f"loss {loss:.4f} at step {step}; {last}")
                self._write(step, "spike", loss, batches)
        self._losses.append(loss)

    def _write(self, step: int, kind: str, loss: float, batches: Sequence[MicroBatch]) -> None:
        own = [row for batch in batches for row in batch.rows_M if row >= 0]
        rows = [row for part in comm.gather_objects(own) for row in part]
        self._lines.append({"step": step, "kind": kind, "loss": loss, "rows": sorted(rows)})
