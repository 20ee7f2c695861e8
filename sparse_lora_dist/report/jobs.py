"""The jobs that made a run, one after another: what attempts.jsonl says, and what it leaves out."""

from collections.abc import Sequence
from dataclasses import dataclass

from sparse_lora_dist.report.jsonl import Record

GOING = "still going"


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One job's part of a run."""

    first: int
    last: int
    """Steps that it began from and came to, at the least: not every step is logged."""
    began: float | None = None
    """Seconds since 1970."""
    seconds: float | None = None
    """How long it trained; None where nobody wrote that down."""
    world_size: int | None = None
    ended: str


def jobs_of(rows: Sequence[Record], metrics: Sequence[Record], *, going: bool) -> list[Attempt]:
    """Each beginning with its end, or, where a job did not live to write one, what the next one
    found. ``going``: a job holds the run's lock."""
    first, last = metrics[0]["step"], metrics[-1]["step"]
    if not rows or rows[0]["event"] != "begins":  # of a version that did not write attempts
        return [Attempt(first=first, last=last, ended=GOING if going else "not written down")]
    found = []
    for row, following in zip(rows, [*rows[1:], None], strict=True):
        if row["event"] == "begins":
            found.append(_job(row, following, last_logged=last, going=going))
    if going and rows[-1]["event"] != "begins":  # loads, and has yet to write that it begins
        found.append(Attempt(first=rows[-1]["step"], last=rows[-1]["step"], ended=GOING))
    return found


def _job(row: Record, following: Record | None, *, last_logged: int, going: bool) -> Attempt:
    end = None
    if following is None:
        last, ended = last_logged, GOING if going else "cut short"
    elif following["event"] == "begins":
        # A checkpoint may be of a step that was not logged.
        last, ended = max(following["reached"], following["step"]), "cut short"
    else:
        why = following.get("why")
        last, end = following["step"], following["time"]
        ended = f"{following['event']} by {why}" if why else following["event"]
    return Attempt(
        first=row["step"],
        last=max(row["step"], last),
        began=row["time"],
        seconds=None if end is None else end - row["time"],
        world_size=row["world_size"],
        ended=ended,
    )
