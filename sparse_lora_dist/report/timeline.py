"""Figure of a run's jobs (starts of the training program): the steps of each and how it ended, with
checkpoints and bad steps."""

from datetime import datetime
from itertools import pairwise, starmap
from typing import Any

from sparse_lora_dist.distributed.console import counted
from sparse_lora_dist.report.jobs import Attempt
from sparse_lora_dist.report.run_data import RunData
from sparse_lora_dist.report.style import SERIES, Picture, panels

BAR: dict[str, Any] = {"height": 0.3, "color": SERIES[0]}
"""Keyword arguments of ``barh`` for the bar of a job."""
MAX_BARS = 12
"""Largest number of jobs that have a bar. Only the last jobs are drawn, because a run that is often
preempted has hundreds."""
KINDS = {
    "left out": ("step left out", "x", SERIES[4]),
    "spike": ("loss spike", "^", SERIES[3]),
}
"""Kind of a bad step in bad_steps.jsonl -> (label, marker, colour)."""


def timeline(run: RunData) -> Picture:
    """Draw one bar for each job over optimizer steps, the first on top.

    The part of a bar whose steps the next job had to repeat is orange. Markers for checkpoints and
    for bad steps stand below the bars.
    """
    jobs, end = run.attempts[-MAX_BARS:], max(run.total_steps or 1, run.last_step)
    first = len(run.attempts) - len(jobs) + 1
    figure, (axes,) = panels(height=1.3 + 0.5 * len(jobs))
    for row, job in enumerate(jobs):
        axes.barh(row, max(job.last - job.first, end / 200), left=job.first, **BAR)
        # Not in the layout: a long label is cut at the edge instead of shrinking the axes.
        axes.text(0, row - 0.2, job_label(job), va="bottom", size=8, in_layout=False)
    for row, (job, following) in enumerate(pairwise(jobs)):
        axes.barh(
            row, repeated_steps(job, following), left=following.first, **BAR | {"color": SERIES[1]}
        )
    _marks(axes, run, len(jobs))
    axes.set(xlabel="step", xlim=(0, end), ylim=(len(jobs) + 0.4, -0.8))
    axes.set_yticks(range(len(jobs)), [f"job {first + i}" for i in range(len(jobs))])
    axes.grid(axis="y", visible=False)
    axes.spines.left.set_visible(False)
    axes.tick_params(axis="y", length=0)
    if axes.get_legend_handles_labels()[0]:
        figure.legend(loc="outside lower center", ncols=3)
    made_again = sum(starmap(repeated_steps, pairwise(run.attempts)))
    jobs_made = counted(len(run.attempts), "job")
    if made_again:  # "at least", because a killed job may have made steps that it did not log
        jobs_made += f", at least {counted(made_again, 'step')} lost and repeated (orange)"
    return Picture(
        name="timeline",
        title="Jobs, checkpoints and interruptions",
        caption=f"{jobs_made}. Checkpoints shown are those still on disk.",
        figure=figure,
    )


def repeated_steps(job: Attempt, following: Attempt) -> int:
    """Return the number of steps of ``job`` that the next job, ``following``, had to repeat,
    because they were made after the checkpoint that it resumed from."""
    return max(0, job.last - following.first)


def _marks(axes: Any, run: RunData, row: int) -> None:
    """Draw a marker for each checkpoint and each bad step of ``run``.

    ``row`` is the position of all markers on the y axis.
    """
    bad = {kind: [r["step"] for r in run.bad_steps if r["kind"] == kind] for kind in KINDS}
    saved = [s.step for s in run.checkpoints if not s.damage]
    for (label, mark, colour), steps in zip(
        (("checkpoint", "v", SERIES[2]), *KINDS.values()), (saved, *bad.values()), strict=True
    ):
        if steps:
            height = [row] * len(steps)
            axes.plot(steps, height, mark, color=colour, label=label, clip_on=False)


def job_label(job: Attempt) -> str:
    """Return the label of a job: "14 Oct 13:05, 2 ranks, 3 min: stopped by SIGTERM".

    The time is local. What is not recorded is left out.
    """
    parts = []
    if job.began is not None:
        parts.append(datetime.fromtimestamp(job.began).strftime("%-d %b %H:%M"))
    if job.world_size is not None:
        parts.append(counted(job.world_size, "rank"))
    if job.seconds is not None:
        parts.append(duration_text(job.seconds))
    return f"{', '.join(parts)}: {job.ended}" if parts else job.ended


def duration_text(seconds: float) -> str:
    """Return a duration as text: "42 s", "5 min" or "3.2 h"."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
