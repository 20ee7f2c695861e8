"""Plots of loss, live entries, throughput and memory over steps, with a line for each run."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from sparse_lora_dist.report.run_data import RunData
from sparse_lora_dist.report.style import SERIES, Line, Picture, lines, panels, plain_numbers

Runs = Sequence[RunData]
"""Runs of one report, at least one. Each has a line of its own in a figure."""
Points = tuple[Sequence[float], Sequence[float]]
"""Points of a curve: (their optimizer steps, ascending; their values)."""
MAX_POINTS = 600
"""Largest number of points of a curve. More points would merge on the screen into a solid band, and
make the page large."""


def loss(runs: Runs) -> Picture:
    """Plot the training loss, its running mean and the held-out loss of each run over steps."""
    figure, (axes,) = panels(height=3.2)
    for run, line in _with_lines(runs):
        steps, values = thinned(run.series("loss"))
        axes.plot(steps, values, color=line.colour, alpha=0.3, linewidth=0.8)
        axes.plot(steps, running_mean(values), **_line_style(line), linewidth=1.4)
        held_out = line.colour if len(runs) > 1 else SERIES[1]
        marks = {"marker": line.mark, "markersize": 3.5, "linestyle": "--", "linewidth": 1}
        axes.plot(*run.series("held_out_loss"), color=held_out, **marks)
    axes.set(xlabel="step", ylabel="nats per target")
    _legend(figure, runs)
    return Picture(
        name="loss",
        title="Loss",
        caption="Strong line: running mean of the training loss; faint line: the logged values"
        + (f", averaged over {every} records a point" if (every := _every(runs)) > 1 else "")
        + ". Markers: held-out loss.",
        figure=figure,
    )


def thinned(points: Points) -> Points:
    """Return at most ``MAX_POINTS`` points, each the mean of equally many consecutive points.

    The last point may be the mean of fewer. Example: 1,200 points become 600; each has the mean
    step and the mean value of two neighbours.
    """
    steps, values = points
    every = -(-len(steps) // MAX_POINTS)
    if every <= 1:
        return points
    parts = [slice(i, i + every) for i in range(0, len(steps), every)]
    means = [[float(np.mean(each[part])) for part in parts] for each in points]
    return means[0], means[1]


def _every(runs: Runs) -> int:
    """Return how many logged losses ``thinned`` averages into a point, for the longest run."""
    return max(-(-len(run.series("loss")[0]) // MAX_POINTS) for run in runs)


def running_mean(values: Sequence[float]) -> list[float]:
    """Return for each value the mean over a window that is centred on it, as a list of the same
    length.

    The window has about a twentieth of all values. Near both ends of the list it shrinks to stay
    centred, so that a straight line stays unchanged.
    """
    last, half = len(values) - 1, len(values) // 40
    reaches = [min(half, i, last - i) for i in range(len(values))]
    return [float(np.mean(values[i - r : i + r + 1])) for i, r in enumerate(reaches)]


def live(runs: Runs) -> Picture:
    """Plot the number of live entries over steps, with a panel below for each number that the
    method logs with its decisions, such as its budget.

    Live entries are those that the optimizer steps and keeps moments for.
    """
    keys = list(dict.fromkeys(key for run in runs for key in run.log_keys()))
    figure, rows = panels(1 + len(keys), height=2.4 + 1.4 * len(keys), sharex=True)
    for axes, key in zip(rows, ["live_entries", *keys], strict=True):
        for run, line in _with_lines(runs):
            points = without_plateaus(run.series(key))
            axes.plot(*points, **_line_style(line), drawstyle="steps-post")
        axes.set_title(key.replace("_", " "))
        axes.set_ylim(bottom=0)
        plain_numbers(axes)
    rows[-1].set_xlabel("step")
    _legend(figure, runs)
    return Picture(
        name="live",
        title="Live entries and budget",
        caption="Entries that the optimizer steps and keeps moments for, summed over all ranks."
        + (f" Logged by the method: {', '.join(keys)}." if keys else ""),
        figure=figure,
    )


def without_plateaus(points: Points) -> Points:
    """Return the points without those whose value equals the values before and after it.

    The first and the last point stay, so a line through the points looks the same.
    """
    steps, values = points
    ends = {0, len(steps) - 1}
    kept = [i for i in range(len(steps)) if i in ends or len({*values[i - 1 : i + 2]}) > 1]
    return [steps[i] for i in kept], [values[i] for i in kept]


def stages(runs: Runs) -> Picture:
    """Plot the held-out loss against the total rank of all sites, with a point per stage.

    A stage is a part of a run with a learning-rate schedule of its own, at whose end the method
    SoRA records the rank and the loss. A site is a linear that carries an adapter.

    Args:
        runs: runs that have at least one record of a stage.
    """
    figure, (axes,) = panels()
    for run, line in _with_lines(runs):
        points = [(r["live_ranks"], r["held_out_loss"], r["lambda"]) for r in run.stages]
        ranks, losses, lambdas = zip(*points, strict=True)
        axes.plot(ranks, losses, **_line_style(line), marker=line.mark)
        for point in zip(ranks, losses, lambdas, strict=True):
            axes.annotate(
                f"{point[2]:g}", point[:2], xytext=(4, 4), textcoords="offset points", size=8
            )
    axes.set(xlabel="total rank of all sites", ylabel="held-out loss")
    _legend(figure, runs)
    return Picture(
        name="stages",
        title="Rank against quality",
        caption="One point for each stage, measured at its end and labelled with its lambda.",
        figure=figure,
    )


def throughput(runs: Runs) -> Picture:
    """Plot tokens per second over steps, of all ranks together and per rank."""
    figure, (axes,) = panels()
    for run, line in _with_lines(runs):
        steps, values = thinned(run.series("tokens_per_s"))
        a_rank = [v / _world_size(run, s) for s, v in zip(steps, values, strict=True)]
        axes.plot(steps, values, **_line_style(line), linewidth=1)
        axes.plot(steps, a_rank, color=line.colour, linewidth=1, linestyle=":")
    axes.set(xlabel="step", ylabel="tokens / s")
    axes.set_ylim(bottom=0)
    plain_numbers(axes)
    _legend(figure, runs)
    return Picture(
        name="throughput",
        title="Throughput",
        caption="All ranks together; dotted: per rank, the total divided by the number of ranks.",
        figure=figure,
    )


def _world_size(run: RunData, step: float) -> int:
    """Return the number of ranks of the last job that made this step.

    A step may have been made by several jobs, because a job repeats the steps since the checkpoint
    that it resumes from. If the number is not recorded, return that of the newest job, or 1.
    """
    sizes = [a.world_size for a in run.attempts if a.first < step <= a.last and a.world_size]
    return sizes[-1] if sizes else run.world_size or 1


def memory(runs: Runs) -> Picture:
    """Plot the peak memory of a rank since its job began, in GB of 10^9 bytes.

    A line shows the highest peak of all ranks at each logged step. Crosses show the peak of every
    rank at each checkpoint.
    """
    figure, (axes,) = panels()
    for run, line in _with_lines(runs):
        steps, values = without_plateaus(run.series("peak_memory_bytes"))
        axes.plot(steps, in_gb(values), **_line_style(line), linewidth=1)
        for saved in run.checkpoints:
            axes.plot([saved.step] * len(saved.peaks), in_gb(saved.peaks), "x", color=line.colour)
    axes.set(xlabel="step", ylabel="GB")
    axes.set_ylim(bottom=0)
    _legend(figure, runs)
    words = {True: "allocated on its GPU", False: "resident in its process"}
    where = dict.fromkeys(words[s.environment.get("device") == "cuda"] for s in runs)
    return Picture(
        name="memory",
        title="Peak memory of a rank",
        caption=f"Peak since the rank's job began, {' or '.join(where)}. "
        "Line: the rank with the highest peak; crosses: every rank, at checkpoints.",
        figure=figure,
    )


def in_gb(sizes: Sequence[float]) -> list[float]:
    """Convert bytes to GB (10^9 bytes)."""
    return [size / 1e9 for size in sizes]


def _with_lines(runs: Runs) -> Iterator[tuple[RunData, Line]]:
    yield from zip(runs, lines(len(runs)), strict=True)


def _line_style(line: Line) -> dict[str, Any]:
    return {"color": line.colour, "linestyle": line.dash}


def _legend(figure: Figure, runs: Runs) -> None:
    if len(runs) < 2:
        return
    # Handles are given explicitly: matplotlib drops labels that begin with "_", as a run's may.
    handles = [Line2D([], [], **_line_style(line)) for _, line in _with_lines(runs)]
    names = [run.name for run in runs]
    figure.legend(handles, names, loc="outside lower center", ncols=2)
