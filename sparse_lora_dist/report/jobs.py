"""Lists the jobs of a run from attempts.jsonl, and from metrics.jsonl for what is missing there."""

from collections.abc import Sequence
from dataclasses import dataclass

from sparse_lora_dist.report.jsonl import Record

GOING = "still going"
"""State of a run on which a job works now."""


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One job of a run: the steps it made, when, and how it ended."""

    first: int
    """Optimizer step that the job started from."""
    last: int
    """Last optimizer step that the job is known to have reached. A killed job may have reached a
    later one, because not every step is logged."""
    began: float | None = None
    """Start time in seconds since 1970; None if it is not recorded."""
    seconds: float | None = None
    """Seconds from the job's start to its end; None if its end is not recorded."""
    world_size: int | None = None
    """Number of ranks; None if it is not recorded."""
    ended: str
    """How the job ended: "finished", "stopped by ...", "cut short" (killed), "still going", or "end
    not recorded"."""


def jobs_of(records: Sequence[Record], metrics: Sequence[Record], *, going: bool) -> list[Attempt]:
    """Return the jobs of a run in order, at least one.

    A job has a begin record and an end record. A killed job has no end record. Its last step is
    then taken from the begin record of the next job, or from the last logged step if there is no
    next job.

    Args:
        records: records of attempts.jsonl; empty if the run has no such file.
        metrics: records of metrics.jsonl, at least one.
        going: True if a job holds the lock of the run folder now.
    """
    first, last = metrics[0]["step"], metrics[-1]["step"]
    if not records or records[0]["event"] != "begins":  # older versions wrote no attempts.jsonl
        return [Attempt(first=first, last=last, ended=GOING if going else "end not recorded")]
    found = []
    for record, following in zip(records, [*records[1:], None], strict=True):
        if record["event"] == "begins":
            found.append(_job(record, following, last_logged=last, going=going))
    if going and records[-1]["event"] != "begins":  # a new job loads, and writes "begins" later
        found.append(Attempt(first=records[-1]["step"], last=records[-1]["step"], ended=GOING))
    return found


def _job(record: Record, following: Record | None, *, last_logged: int, going: bool) -> Attempt:
    """Return the job that began with ``record``; ``following`` is the next record, if any."""
    end = None
    if following is None:
        last, ended = last_logged, GOING if going else "cut short"
    elif following["event"] == "begins":
        # The checkpoint that the next job resumes from may be later than the last logged step.
        last, ended = max(following["reached"], following["step"]), "cut short"
    else:
        why = following.get("why")
        last, end = following["step"], following["time"]
        ended = f"{following['event']} by {why}" if why else following["event"]
    return Attempt(
        first=record["step"],
        last=max(record["step"], last),
        began=record["time"],
        seconds=None if end is None else end - record["time"],
        world_size=record["world_size"],
        ended=ended,
    )
