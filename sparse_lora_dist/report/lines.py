"""Files of one JSON object a line, read strictly: a number that is none must not become a curve."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sparse_lora_dist.errors import UserError

Row = dict[str, Any]


def read_lines(path: Path, is_row: Callable[[Row], bool]) -> list[Row]:
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


def _row(path: Path, number: int, line: str, is_row: Callable[[Row], bool]) -> Row:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UserError(f"{path}, line {number} is damaged: {error}: {line[:60]!r}") from error
    if not (isinstance(row, dict) and is_row(row)):
        raise UserError(f"{path}, line {number} is no row of such a file: {line[:60]!r}")
    return row


def is_count(value: object) -> bool:
    """A whole number from 0 on; True is none."""
    return type(value) is int and value >= 0


def is_metrics(row: Row) -> bool:
    """A step and its numbers, null where JSON has none."""
    numbers = (int, float, type(None))
    return is_count(row.get("step")) and all(isinstance(v, numbers) for v in row.values())


def is_decision(row: Row) -> bool:
    """A step with the open pieces and live entries of every site."""
    sites = [row.get("ranks"), row.get("live")]
    return is_count(row.get("step")) and all(
        isinstance(s, dict) and all(map(is_count, s.values())) for s in sites
    )


def is_stage(row: Row) -> bool:
    """The end of a stage: what lives, and how good it is."""
    return is_metrics(row) and {"live_ranks", "held_out_loss", "lambda"} <= row.keys()


def is_bad_step(row: Row) -> bool:
    """A step and what was wrong with it."""
    return is_count(row.get("step")) and isinstance(row.get("kind"), str)


def is_attempt(row: Row) -> bool:
    """A job begins or ends."""
    begins = row.get("event") == "begins"
    counts = ("step", "reached", "world_size", "total_steps") if begins else ("step",)
    timed = isinstance(row.get("time"), (int, float)) and isinstance(row.get("event"), str)
    return timed and all(is_count(row.get(name)) for name in counts)
