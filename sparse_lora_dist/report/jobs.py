"""Lists the jobs of a run. A job is one start of the training program; a run that was stopped or
killed and resumed has several. They are read from attempts.jsonl. If it lacks the end of a job, the
last step of that job comes from the begin of the next job, or from metrics.jsonl."""

from collections.abc import Sequence
from dataclasses import dataclass

from sparse_lora_dist.report.jsonl import Record

GOING = "still going"
"""Value of ``Attempt.ended`` for a job that works on the run now."""


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One job of a run: one start of the training program, its steps, its time and its end."""

    first: int
    """Optimizer step that the job started from: 0, or that of the checkpoint it resumed. Without
    attempts.jsonl, it is the first logged step."""
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
    """Return the jobs of a run in the order in which they began, at least one.

    A job has a begin record and an end record. A killed job has no end record. Its last step is
    then taken from the begin record of the next job, or from the last logged step if there is no
    next job.

    Args:
        records: JSON objects of attempts.jsonl, one per line of the file; empty if the run has no
            such file.
        metrics: JSON objects of metrics.jsonl, one per line, at least one.
        going: True if a job holds the lock of the run folder now, that is, works on the run.
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
    """Return the job that began with ``record``.

    Args:
        record: begin record of the job in attempts.jsonl.
        following: the next record of the file: the end of this job, or the begin of the next job if
            this one was killed. None if there is no further record.
        last_logged: last optimizer step in metrics.jsonl.
        going: True if a job works on the run now.
    """
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
