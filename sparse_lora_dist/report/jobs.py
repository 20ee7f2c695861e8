"""The jobs of a run in order, from attempts.jsonl and, for what it lacks, from metrics.jsonl."""

from collections.abc import Sequence
from dataclasses import dataclass

from sparse_lora_dist.report.jsonl import Record

GOING = "still going"


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """The part of a run that one job made."""

    first: int
    """Step that the job began from."""
    last: int
    """Last step that it is known to have reached; it may have made more, as not all are logged."""
    began: float | None = None
    """Start time in seconds since 1970; None if it is not recorded."""
    seconds: float | None = None
    """How long the job trained; None if its end is not recorded."""
    world_size: int | None = None
    """Number of ranks; None if it is not recorded."""
    ended: str
    """How the job ended: "finished", "stopped by ...", "cut short", or "still going"."""


def jobs_of(records: Sequence[Record], metrics: Sequence[Record], *, going: bool) -> list[Attempt]:
    """Pair the begin record of every job with its end record.

    A job that was killed has no end record; its last step is then taken from the begin record of
    the next job, or from the last logged step if there is no next job.

    Args:
        records: records of attempts.jsonl, empty if the run has no such file.
        metrics: records of metrics.jsonl, at least one.
        going: whether a job holds the run's lock now.
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
