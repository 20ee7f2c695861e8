"""Reads the JSON-lines files of a run folder and checks their records, so that no NaN or infinity
is drawn. A record is the JSON object of one line."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sparse_lora_dist.errors import UserError
from sparse_lora_dist.system.small_files import parse_json

Record = dict[str, Any]
"""JSON object of one line of a file: name of a field -> value."""
LARGEST = 1e300
"""Upper bound on the magnitude of numbers, because matplotlib fails near the largest float."""
YEAR_5000 = 9.5e10
"""Upper bound on times in seconds since 1970, because ``datetime`` ends at the year 9999."""


def read_lines(path: Path, is_record: Callable[[Record], bool]) -> list[Record]:
    """Read and check the records of a JSON-lines file.

    Text after the last newline is ignored: it is still being written, or a crash cut it short.

    Args:
        path: the file.
        is_record: function that takes the JSON object of a line and returns True if it has the
            fields and types that this file must have, such as ``is_metrics``.

    Returns:
        The records, one per line.

    Raises:
        UserError: if the file cannot be read, or a line is not such a record.
    """
    try:
        *lines, _ = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path} cannot be read: {error}. Restore the file from a copy of the run folder."
        ) from error
    return [_record(path, number, line, is_record) for number, line in enumerate(lines, start=1)]


def by_step(rows: Sequence[Record]) -> list[Record]:
    """Return records in the order of their steps, and only the last one of each step.

    A run writes them so; a file that was put together by hand may have another order.

    Args:
        rows: records, each with the field "step".
    """
    last = {row["step"]: row for row in rows}
    return [last[step] for step in sorted(last)]


def _record(path: Path, number: int, line: str, is_record: Callable[[Record], bool]) -> Record:
    try:
        record = parse_json(line, constant=no_constant)
    except ValueError as error:
        raise UserError(
            f"{path}, line {number} is not valid JSON: {error}. The line begins with "
            f"{line[:60]!r}. Repair or delete that line."
        ) from error
    if not (isinstance(record, dict) and is_record(record)):
        raise UserError(
            f"{path}, line {number} does not have the fields and types of a record of this file. "
            f"The line begins with {line[:60]!r}. Repair or delete that line."
        )
    return record


def no_constant(word: str) -> float:
    """Raise ValueError; pass this function as ``constant`` to ``parse_json``.

    ``parse_json`` then calls it for NaN, Infinity and -Infinity, which it would otherwise accept
    although they are not JSON. ``word`` is the one found.
    """
    raise ValueError(f"{word} is not allowed in JSON")


def is_count(value: object) -> bool:
    """Return True for an integer from 0 to below 2^63 that is not a bool."""
    return type(value) is int and 0 <= value < 2**63


def is_number(value: object) -> bool:
    """Return True for a number that can be drawn: its magnitude is below ``LARGEST``.

    1e999 is valid JSON, but becomes infinity in Python and cannot be drawn.
    """
    return isinstance(value, (int, float)) and -LARGEST < value < LARGEST


def is_metrics(record: Record) -> bool:
    """Return True for a record of metrics.jsonl: it has the field "step", an integer, and all other
    fields are numbers or null."""
    return is_count(record.get("step")) and all(v is None or is_number(v) for v in record.values())


def is_decision(record: Record) -> bool:
    """Return True for a record of decisions.jsonl, which says what the method changed at a step.

    It has the fields "step" (an integer), "ranks" (JSON object: site -> rank of its adapter) and
    "live" (JSON object: site -> number of its entries that the optimizer steps). A site is a linear
    that carries an adapter. Both objects have the same sites, at least one.
    """
    ranks, live = record.get("ranks"), record.get("live")
    if not (isinstance(ranks, dict) and isinstance(live, dict)):
        return False
    counts = (record.get("step"), *ranks.values(), *live.values())
    return len(ranks) > 0 and ranks.keys() == live.keys() and all(map(is_count, counts))


def check_sites(path: Path, decisions: Sequence[Record]) -> None:
    """Raise UserError if a decision lists other sites than the first decision does.

    Args:
        path: decisions.jsonl of the run, for the message.
        decisions: all records of the file; each has passed ``is_decision``.
    """
    for number, record in enumerate(decisions, start=1):
        if record["ranks"].keys() != decisions[0]["ranks"].keys():
            raise UserError(
                f"{path}, line {number} lists other sites than line 1. All records of a run list "
                "the same sites. Delete the records of other runs."
            )


def is_stage(record: Record) -> bool:
    """Return True for a record of stages.jsonl.

    A stage is a part of a run with a learning-rate schedule of its own. Its record has the fields
    of a record of metrics.jsonl, and the fields "live_ranks" (sum of the ranks of all adapters) and
    "held_out_loss", both at its end.
    """
    return is_metrics(record) and {"live_ranks", "held_out_loss"} <= record.keys()


def is_bad_step(record: Record) -> bool:
    """Return True for a record of bad_steps.jsonl: it has the field "step" and the field "kind",
    a text that says what was wrong with the step, such as "spike"."""
    return is_count(record.get("step")) and isinstance(record.get("kind"), str)


def is_attempt(record: Record) -> bool:
    """Return True for a record of attempts.jsonl: the begin or the end of a job.

    It has the field "event" ("begins", or a text that says how the job ended), its "time" in
    seconds since 1970, and the "step" at which the job began or ended. A begin also has "reached"
    (last step that earlier jobs logged), "world_size" and "total_steps".
    """
    begins, time = record.get("event") == "begins", record.get("time", -1)
    counts = ("step", "reached", "world_size", "total_steps") if begins else ("step",)
    timed = is_number(time) and 0 <= time < YEAR_5000 and isinstance(record.get("event"), str)
    return timed and all(is_count(record.get(name)) for name in counts)
