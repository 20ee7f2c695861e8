"""Strict reading of JSON-lines files: NaN, infinities and wrong types are errors, never drawn."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sparse_lora_dist.errors import UserError

Record = dict[str, Any]
LARGEST = 1e300
"""Largest magnitude of a number: matplotlib fails near the largest float."""
YEAR_5000 = 9.5e10
"""Latest time, in seconds since 1970: ``datetime`` ends at the year 9999."""


def read_lines(path: Path, is_record: Callable[[Record], bool]) -> list[Record]:
    """Read the records of a JSON-lines file.

    Text after the last newline is ignored: it is still being written, or a crash cut it short.

    Args:
        is_record: whether an object has the fields and types of a record of this file.

    Raises:
        UserError: if the file cannot be read, or a line is not such a record.
    """
    try:
        *lines, _ = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    return [_record(path, number, line, is_record) for number, line in enumerate(lines, start=1)]


def _record(path: Path, number: int, line: str, is_record: Callable[[Record], bool]) -> Record:
    try:
        record = json.loads(line, parse_constant=no_constant)
    except ValueError as error:
        raise UserError(
            f"{path}, line {number} is not valid JSON: {error}. Repair or delete the line that "
            f"begins with {line[:60]!r}."
        ) from error
    if not (isinstance(record, dict) and is_record(record)):
        raise UserError(
            f"{path}, line {number} does not have the fields and types of a record of this file. "
            f"Repair or delete the line that begins with {line[:60]!r}."
        )
    return record


def no_constant(word: str) -> float:
    """Refuse NaN and Infinity, which ``json.loads`` accepts though JSON has no such numbers."""
    raise ValueError(f"{word} is not a number in JSON")


def is_count(value: object) -> bool:
    """Is this an integer of at least 0? A bool is not."""
    return type(value) is int and 0 <= value < LARGEST


def is_number(value: object) -> bool:
    """Is this a number that can be drawn? 1e999, which is valid JSON, is not."""
    return isinstance(value, (int, float)) and -LARGEST < value < LARGEST


def is_metrics(record: Record) -> bool:
    """Has this record a step, and only numbers or null besides?"""
    return is_count(record.get("step")) and all(v is None or is_number(v) for v in record.values())


def is_decision(record: Record) -> bool:
    """Has this record a step, and open components and live entries of the same sites?"""
    ranks, live = record.get("ranks"), record.get("live")
    if not (isinstance(ranks, dict) and isinstance(live, dict)):
        return False
    counts = (record.get("step"), *ranks.values(), *live.values())
    return len(ranks) > 0 and ranks.keys() == live.keys() and all(map(is_count, counts))


def check_sites(path: Path, decisions: Sequence[Record]) -> None:
    """Raise UserError if a decision lists other sites than the first decision of the file."""
    for number, record in enumerate(decisions, start=1):
        if record["ranks"].keys() != decisions[0]["ranks"].keys():
            raise UserError(
                f"{path}, line {number} lists other sites than line 1; all records of a run must "
                "list the same. Delete the records that are of another run."
            )


def is_stage(record: Record) -> bool:
    """Is this the record of a stage's end, with its total rank and its held-out loss?"""
    return is_metrics(record) and {"live_ranks", "held_out_loss"} <= record.keys()


def is_bad_step(record: Record) -> bool:
    """Has this record a step, and a kind that says what was wrong with it?"""
    return is_count(record.get("step")) and isinstance(record.get("kind"), str)


def is_attempt(record: Record) -> bool:
    """Does this record say that a job began or ended?"""
    begins, time = record.get("event") == "begins", record.get("time", -1)
    counts = ("step", "reached", "world_size", "total_steps") if begins else ("step",)
    timed = is_number(time) and 0 <= time < YEAR_5000 and isinstance(record.get("event"), str)
    return timed and all(is_count(record.get(name)) for name in counts)
