"""The figure of a run's jobs: from which step to which, how each ended, what was saved."""

from datetime import datetime
from itertools import pairwise, starmap
from typing import Any

from sparse_lora_dist.distributed.console import counted
from sparse_lora_dist.report.jobs import Attempt
from sparse_lora_dist.report.run_data import RunData
from sparse_lora_dist.report.style import SERIES, Picture, panels

BAR: dict[str, Any] = {"height": 0.3, "color": SERIES[0]}
MOST = 12
"""Jobs with a bar, the last of them: a run that is preempted may have hundreds."""
KINDS = {
    "left out": ("step left out", "x", SERIES[4]),
    "spike": ("loss spike", "^", SERIES[3]),
}
"""Of bad steps: how each is marked."""


def timeline(run: RunData) -> Picture:
    """A bar a job, the first on top; checkpoints and bad steps below."""
    jobs, end = run.attempts[-MOST:], max(run.total_steps or 1, run.last_step)
    first = len(run.attempts) - len(jobs) + 1
    figure, (axes,) = panels(height=1.3 + 0.5 * len(jobs))
    for row, job in enumerate(jobs):
        axes.barh(row, max(job.last - job.first, end / 200), left=job.first, **BAR)
        # Of words that are too many for the figure the last ones are cut, not the axes.
        axes.text(0, row - 0.2, described(job), va="bottom", size=8, in_layout=False)
    for row, (job, following) in enumerate(pairwise(jobs)):
        axes.barh(row, lost(job, following), left=following.first, **BAR | {"color": SERIES[1]})
    _marks(axes, run, len(jobs))
    axes.set(xlabel="step", xlim=(0, end), ylim=(len(jobs) + 0.4, -0.8))
    axes.set_yticks(range(len(jobs)), [f"job {first + i}" for i in range(len(jobs))])
    axes.grid(axis="y", visible=False)
    axes.spines.left.set_visible(False)
    axes.tick_params(axis="y", length=0)
    if axes.get_legend_handles_labels()[0]:
        figure.legend(loc="outside lower center", ncols=3)
    made_again = sum(starmap(lost, pairwise(run.attempts)))
    jobs_made = counted(len(run.attempts), "job")
    if made_again:  # at least: nobody knows of those after the last that was logged
        jobs_made += f", at least {counted(made_again, 'step')} lost and made again (orange)"
    return Picture(
        name="timeline",
        title="Jobs, checkpoints and interruptions",
        caption=f"{jobs_made}. Checkpoints: those still there.",
        figure=figure,
    )


def lost(job: Attempt, following: Attempt) -> int:
    """Steps of a job that the next one made again."""
    return max(0, job.last - following.first)


def _marks(axes: Any, run: RunData, row: int) -> None:
    bad = {kind: [r["step"] for r in run.bad_steps if r["kind"] == kind] for kind in KINDS}
    saved = [s.step for s in run.checkpoints if not s.damage]
    for (label, mark, colour), steps in zip(
        (("checkpoint", "v", SERIES[2]), *KINDS.values()), (saved, *bad.values()), strict=True
    ):
        if steps:
            height = [row] * len(steps)
            axes.plot(steps, height, mark, color=colour, label=label, clip_on=False)


def described(job: Attempt) -> str:
    """14 Oct 13:05, 2 ranks, 3 min: stopped by SIGTERM"""
    parts = []
    if job.began is not None:
        parts.append(datetime.fromtimestamp(job.began).strftime("%-d %b %H:%M"))
    if job.world_size is not None:
        parts.append(counted(job.world_size, "rank"))
    if job.seconds is not None:
        parts.append(in_words(job.seconds))
    return f"{', '.join(parts)}: {job.ended}" if parts else job.ended


def in_words(seconds: float) -> str:
    """42 s, 5 min, 3.2 h"""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
