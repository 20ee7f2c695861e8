"""Reads JSON-lines files and checks the records, so that no NaN or infinity is drawn."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sparse_lora_dist.errors import UserError

Record = dict[str, Any]
LARGEST = 1e300
"""Bound on the magnitude of numbers, because matplotlib fails near the largest float."""
YEAR_5000 = 9.5e10
"""Bound on times in seconds since 1970, because ``datetime`` ends at the year 9999."""


def read_lines(path: Path, is_record: Callable[[Record], bool]) -> list[Record]:
    """Read and check the records of a JSON-lines file.

    Text after the last newline is ignored: it is still being written, or a crash cut it short.

    Args:
        path: the file.
        is_record: returns True if an object has the fields and types of a record of this file.

    Returns:
        The records, one per line.

    Raises:
        UserError: if the file cannot be read, or a line is not such a record.
    """
    try:
        *lines, _ = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path} cannot be read: {error}. Restore the file from a copy of the run folder."
        ) from error
    return [_record(path, number, line, is_record) for number, line in enumerate(lines, start=1)]


def _record(path: Path, number: int, line: str, is_record: Callable[[Record], bool]) -> Record:
    try:
        record = json.loads(line, parse_constant=no_constant)
    except ValueError as error:
        raise UserError(
            f"{path}, line {number} is not valid JSON: {error}. The line begins with "
            f"{line[:60]!r}. Repair or delete it."
        ) from error
    if not (isinstance(record, dict) and is_record(record)):
        raise UserError(
            f"{path}, line {number} does not have the fields and types of a record of this file. "
            f"The line begins with {line[:60]!r}. Repair or delete it."
        )
    return record


def no_constant(word: str) -> float:
    """Raise ValueError for NaN and Infinity, which ``json.loads`` accepts although they are not
    JSON. This is for its argument ``parse_constant``."""
    raise ValueError(f"{word} is not a number in JSON")


def is_count(value: object) -> bool:
    """Return True for an integer of at least 0 that is not a bool."""
    return type(value) is int and 0 <= value < LARGEST


def is_number(value: object) -> bool:
    """Return True for a number that can be drawn, which 1e999 cannot though it is valid JSON."""
    return isinstance(value, (int, float)) and -LARGEST < value < LARGEST


def is_metrics(record: Record) -> bool:
    """Return True for a record of metrics.jsonl: a step, and only numbers or null besides."""
    return is_count(record.get("step")) and all(v is None or is_number(v) for v in record.values())


def is_decision(record: Record) -> bool:
    """Return True for a record of decisions.jsonl.

    It has a step, and for the same sites a number of open components ("ranks") and of live entries
    ("live").
    """
    ranks, live = record.get("ranks"), record.get("live")
    if not (isinstance(ranks, dict) and isinstance(live, dict)):
        return False
    counts = (record.get("step"), *ranks.values(), *live.values())
    return len(ranks) > 0 and ranks.keys() == live.keys() and all(map(is_count, counts))


def check_sites(path: Path, decisions: Sequence[Record]) -> None:
    """Raise UserError if a decision lists other sites than the first decision does.

    Args:
        path: the file of the decisions, for the message.
        decisions: all records of the file.
    """
    for number, record in enumerate(decisions, start=1):
        if record["ranks"].keys() != decisions[0]["ranks"].keys():
            raise UserError(
                f"{path}, line {number} lists other sites than line 1. All records of a run list "
                "the same sites. Delete the records of other runs."
            )


def is_stage(record: Record) -> bool:
    """Return True for a record of stages.jsonl: the total rank and held-out loss of a stage."""
    return is_metrics(record) and {"live_ranks", "held_out_loss"} <= record.keys()


def is_bad_step(record: Record) -> bool:
    """Return True for a record of bad_steps.jsonl: a step, and what was wrong with it ("kind")."""
    return is_count(record.get("step")) and isinstance(record.get("kind"), str)


def is_attempt(record: Record) -> bool:
    """Return True for a record of attempts.jsonl: the begin or the end of a job, with its time."""
    begins, time = record.get("event") == "begins", record.get("time", -1)
    counts = ("step", "reached", "world_size", "total_steps") if begins else ("step",)
    timed = is_number(time) and 0 <= time < YEAR_5000 and isinstance(record.get("event"), str)
    return timed and all(is_count(record.get(name)) for name in counts)
