"""Terminal output: labelled lines and progress, printed by rank 0 only.

Progress is a bar on a terminal. In a file a bar would be one line of thousands of letters and
carriage returns, so there progress is plain lines.
"""

import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from datetime import timedelta
from typing import Any, TypeVar

from tqdm import tqdm

from sparse_lora_dist.distributed import comm
from sparse_lora_dist.distributed.device import device_in_words
from sparse_lora_dist.distributed.launch import Launch
from sparse_lora_dist.distributed.launch_slurm import tasks_without_srun
from sparse_lora_dist.system.program_names import as_started_here

Item = TypeVar("Item")

LINES_EVERY_S = 30.0
"""Seconds between two lines of ``with_progress``."""


def print_line(label: str, text: str = "") -> None:
    """Print one line on rank 0, above the progress bar if there is one. Not collective.

    Args:
        label: first word of the line, such as "note", padded to 10 columns. Empty if the line
            continues the one above.
        text: rest of the line.
    """
    if comm.rank() == 0:
        start = f"{label:<10}" if len(label) < 10 else f"{label} "
        if sys.stdout is not None:  # a program without a console
            tqdm.write(f"{start}{as_started_here(text)}".rstrip(), file=sys.stdout)
            sys.stdout.flush()


def print_launch(launch: Launch) -> None:
    """Print how the ranks were started and what they compute on, or warn if Slurm expected more
    ranks. Collective.

    Args:
        launch: what ``comm.start`` returned.
    """
    if launch.world_size > 1:
        print_line("launch", launch.in_words(comm.num_nodes()))
    elif launch.launcher == "python" and (text := tasks_without_srun(os.environ, sys.argv[0])):
        print_line("warning", text)
    print_line("device", device_in_words(comm.on_gpu()))


def on_terminal() -> bool:
    """Return True if stderr, where bars are shown, is a terminal."""
    return sys.stderr is not None and sys.stderr.isatty()


class StepProgress:
    """Progress of a run's optimizer steps, shown on rank 0 only. Not collective.

    Args:
        total: optimizer steps of the run.
        done: optimizer steps already taken, in an earlier part of a resumed run.
    """

    def __init__(self, total: int, done: int) -> None:
        self._total, self._done = total, done
        self._since, self._first = time.monotonic(), done
        self._shows = comm.rank() == 0
        self._bar: Any = None
        if self._shows and on_terminal():
            self._bar = tqdm(total=total, initial=done, unit="step", dynamic_ncols=True)

    def advance(self, numbers: str | None) -> None:
        """Count an optimizer step.

        Args:
            numbers: text with the numbers logged after it, such as "loss 2.100"; None if none were.
                In a file it makes a line.
        """
        begins = self._done == self._first
        self._done += 1
        if self._bar is not None:
            if numbers is not None:
                self._bar.set_postfix_str(numbers, refresh=False)
            self._bar.update()
        elif self._shows and numbers is not None:
            left = _time_left(self._since, self._done - self._first, self._total - self._done)
            print_line("step", f"{self._done} of {self._total}, {numbers}, {left}")
        if begins:  # what comes before the first step takes time of its own
            self._since, self._first = time.monotonic(), self._done

    def close(self) -> None:
        """Remove the bar from the line that the cursor is in."""
        if self._bar is not None:
            self._bar.close()


def with_progress(items: Sequence[Item], name: str) -> Iterable[Item]:
    """Return an iterable over ``items`` that shows on rank 0 how far it is. Not collective.

    On a terminal it is a bar, which disappears at the end. In a file there is a line every
    ``LINES_EVERY_S``, so short work has none.

    Args:
        items: what to iterate over.
        name: what is done, such as "loading".
    """
    if comm.rank() != 0:
        return items
    return tqdm(items, desc=name, leave=False) if on_terminal() else _with_lines(items, name)


def _with_lines(items: Sequence[Item], name: str) -> Iterator[Item]:
    began = shown = time.monotonic()
    for done, item in enumerate(items, start=1):
        yield item
        if done < len(items) and time.monotonic() - shown >= LINES_EVERY_S:
            shown = time.monotonic()
            left = _time_left(began, done, len(items) - done)
            print_line("progress", f"{name}: {done} of {len(items)}, {left}")


def _time_left(began: float, done: int, left: int) -> str:
    """Return as text how long work takes on, if it goes on as fast as since ``began``.

    Args:
        began: ``time.monotonic()`` at the start.
        done: number of items done since.
        left: number of items still to do.
    """
    seconds = (time.monotonic() - began) / done * left
    return f"{timedelta(seconds=round(seconds))} left"


def counted(number: int, thing: str) -> str:
    """Return a number with its noun, in the plural unless the number is 1: ``1 rank``, ``2 ranks``.

    Args:
        number: the number.
        thing: the noun in the singular.
    """
    return f"{number:,} {thing}" if number == 1 else f"{number:,} {thing}s"


def megabytes(count: int) -> str:
    """Return a number of bytes as text in MB (10^6 bytes), such as ``3.54 MB``."""
    return f"{count / 1e6:.2f} MB"
