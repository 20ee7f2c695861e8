"""Files of one JSON object a line, read strictly: a number that is none must not become a curve."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sparse_lora_dist.errors import UserError

Record = dict[str, Any]
LARGEST = 1e300
"""Of a number: what comes near the end of floats cannot be drawn."""
YEAR_5000 = 9.5e10
"""In seconds since 1970; dates end soon after."""


def read_lines(path: Path, is_row: Callable[[Record], bool]) -> list[Record]:
    """The rows of ``path``. One that is still being written, or that a crash cut short, is left
    out: the last, without an end of line.

    Raises:
        UserError: the file cannot be read, or a line of it is no such row.
    """
    try:
        *lines, _ = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    return [_row(path, number, line, is_row) for number, line in enumerate(lines, start=1)]


def _row(path: Path, number: int, line: str, is_row: Callable[[Record], bool]) -> Record:
    try:
        row = json.loads(line, parse_constant=no_constant)
    except ValueError as error:
        raise UserError(f"{path}, line {number} is damaged: {error}: {line[:60]!r}") from error
    if not (isinstance(row, dict) and is_row(row)):
        raise UserError(f"{path}, line {number} is no row of such a file: {line[:60]!r}")
    return row


def no_constant(word: str) -> float:
    """For ``json.loads``, which takes NaN and Infinity for numbers. JSON has none."""
    raise ValueError(f"{word} is no number of JSON's")


def is_count(value: object) -> bool:
    """A whole number from 0 on; True is none."""
    return type(value) is int and 0 <= value < LARGEST


def is_number(value: object) -> bool:
    """One that can be drawn: JSON knows 1e999 too."""
    return isinstance(value, (int, float)) and -LARGEST < value < LARGEST


def is_metrics(row: Record) -> bool:
    """A step and its numbers, null where JSON has none."""
    return is_count(row.get("step")) and all(v is None or is_number(v) for v in row.values())


def is_decision(row: Record) -> bool:
    """A step with the open components and live entries of every site."""
    ranks, live = row.get("ranks"), row.get("live")
    if not (isinstance(ranks, dict) and isinstance(live, dict)):
        return False
    counts = (row.get("step"), *ranks.values(), *live.values())
    return len(ranks) > 0 and ranks.keys() == live.keys() and all(map(is_count, counts))


def check_sites(path: Path, decisions: Sequence[Record]) -> None:
    """Raises UserError where a decision is of other sites than the first."""
    for number, row in enumerate(decisions, start=1):
        if row["ranks"].keys() != decisions[0]["ranks"].keys():
            raise UserError(f"{path}, line {number} is of other sites than line 1.")


def is_stage(row: Record) -> bool:
    """The end of a stage: what lives, and how good it is; of methods that have one, its lambda."""
    return is_metrics(row) and {"live_ranks", "held_out_loss"} <= row.keys()


def is_bad_step(row: Record) -> bool:
    """A step and what was wrong with it."""
    return is_count(row.get("step")) and isinstance(row.get("kind"), str)


def is_attempt(row: Record) -> bool:
    """A job begins or ends."""
    begins, time = row.get("event") == "begins", row.get("time", -1)
    counts = ("step", "reached", "world_size", "total_steps") if begins else ("step",)
    timed = is_number(time) and 0 <= time < YEAR_5000 and isinstance(row.get("event"), str)
    return timed and all(is_count(row.get(name)) for name in counts)
