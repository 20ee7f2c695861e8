"""Figures of numbers over steps, of one run or of several in one."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from sparse_lora_dist.report.run_data import RunData
from sparse_lora_dist.report.style import SERIES, Line, Picture, lines, panels, plain_numbers

Stories = Sequence[RunData]
Points = tuple[Sequence[float], Sequence[float]]
MOST = 600
"""Points of a curve: more than a screen has room for are a solid band, and a large page."""


def loss(runs: Stories) -> Picture:
    """Training loss, its running mean, held-out loss."""
    figure, (axes,) = panels(height=3.2)
    for run, line in _drawn(runs):
        steps, values = thinned(run.series("loss"))
        axes.plot(steps, values, color=line.colour, alpha=0.3, linewidth=0.8)
        axes.plot(steps, running_mean(values), **_as(line), linewidth=1.4)
        held_out = line.colour if len(runs) > 1 else SERIES[1]
        marks = {"marker": line.mark, "markersize": 3.5, "linestyle": "--", "linewidth": 1}
        axes.plot(*run.series("held_out_loss"), color=held_out, **marks)
    axes.set(xlabel="step", ylabel="nats per target")
    _legend(figure, runs)
    return Picture(
        name="loss",
        title="Loss",
        caption="Line: training loss, its running mean; faint: as it was logged"
        + (f", in means of {every} rows" if (every := _every(runs)) > 1 else "")
        + ". Dots: the held-out set.",
        figure=figure,
    )


def thinned(points: Points) -> Points:
    """As many as there is room for: means of so many points each that stand one after another."""
    steps, values = points
    every = -(-len(steps) // MOST)
    if every <= 1:
        return points
    parts = [slice(i, i + every) for i in range(0, len(steps), every)]
    means = [[float(np.mean(each[part])) for part in parts] for each in points]
    return means[0], means[1]  # a mean stands in the middle of what it is of


def _every(runs: Stories) -> int:
    return max(-(-len(run.series("loss")[0]) // MOST) for run in runs)


def running_mean(values: Sequence[float]) -> list[float]:
    """Of a twentieth of them around each, fewer at the ends: a straight line stays where it is."""
    last, half = len(values) - 1, len(values) // 40
    reaches = [min(half, i, last - i) for i in range(len(values))]
    return [float(np.mean(values[i - r : i + r + 1])) for i, r in enumerate(reaches)]


def live(runs: Stories) -> Picture:
    """Live entries; below, each number that a method says of its budget."""
    facts = list(dict.fromkeys(fact for run in runs for fact in run.facts()))
    figure, rows = panels(1 + len(facts), height=2.4 + 1.4 * len(facts), sharex=True)
    for axes, key in zip(rows, ["live_entries", *facts], strict=True):
        for run, line in _drawn(runs):
            points = without_plateaus(run.series(key))
            axes.plot(*points, **_as(line), drawstyle="steps-post")
        axes.set_title(key.replace("_", " "))
        axes.set_ylim(bottom=0)
        plain_numbers(axes)
    rows[-1].set_xlabel("step")
    _legend(figure, runs)
    return Picture(
        name="live",
        title="Live parameters and budget",
        caption="Entries that are stepped and have moments, of all ranks together"
        + (f"; {', '.join(facts)} as the method says it." if facts else "."),
        figure=figure,
    )


def without_plateaus(points: Points) -> Points:
    """Those at either side of a change, and the ends: all that a line of plateaus needs."""
    steps, values = points
    ends = {0, len(steps) - 1}
    kept = [i for i in range(len(steps)) if i in ends or len({*values[i - 1 : i + 2]}) > 1]
    return [steps[i] for i in kept], [values[i] for i in kept]


def stages(runs: Stories) -> Picture:
    """Live ranks against held-out loss, a point a stage: the curve that one run draws."""
    figure, (axes,) = panels()
    for run, line in _drawn(runs):
        points = [(r["live_ranks"], r["held_out_loss"], r["lambda"]) for r in run.stages]
        ranks, losses, lambdas = zip(*points, strict=True)
        axes.plot(ranks, losses, **_as(line), marker=line.mark)
        for point in zip(ranks, losses, lambdas, strict=True):
            axes.annotate(
                f"{point[2]:g}", point[:2], xytext=(4, 4), textcoords="offset points", size=8
            )
    axes.set(xlabel="live ranks of all linears", ylabel="held-out loss")
    _legend(figure, runs)
    return Picture(
        name="stages",
        title="Rank against quality",
        caption="The end of every stage, by its lambda.",
        figure=figure,
    )


def throughput(runs: Stories) -> Picture:
    """Tokens a second of the whole job, and of a rank."""
    figure, (axes,) = panels()
    for run, line in _drawn(runs):
        steps, values = thinned(run.series("tokens_per_s"))
        a_rank = [v / _world_size(run, s) for s, v in zip(steps, values, strict=True)]
        axes.plot(steps, values, **_as(line), linewidth=1)
        axes.plot(steps, a_rank, color=line.colour, linewidth=1, linestyle=":")
    axes.set(xlabel="step", ylabel="tokens / s")
    axes.set_ylim(bottom=0)
    plain_numbers(axes)
    _legend(figure, runs)
    return Picture(
        name="throughput",
        title="Throughput",
        caption="Of all ranks; dotted: of one. Ranks keep step, so that is an equal part.",
        figure=figure,
    )


def _world_size(run: RunData, step: float) -> int:
    """Ranks of the job that made this step last; the newest job's where nobody wrote that down."""
    sizes = [a.world_size for a in run.attempts if a.first < step <= a.last and a.world_size]
    return sizes[-1] if sizes else run.world_size or 1


def memory(runs: Stories) -> Picture:
    """Peak memory: the worst rank at every logged step, and each rank at every checkpoint."""
    figure, (axes,) = panels()
    for run, line in _drawn(runs):
        steps, values = without_plateaus(run.series("peak_memory_bytes"))
        axes.plot(steps, in_gb(values), **_as(line), linewidth=1)
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
        caption=f"Since its job began, {' or '.join(where)}. "
        "Line: the worst rank; crosses: each rank, at checkpoints.",
        figure=figure,
    )


def in_gb(sizes: Sequence[float]) -> list[float]:
    """Bytes in 10^9."""
    return [size / 1e9 for size in sizes]


def _drawn(runs: Stories) -> Iterator[tuple[RunData, Line]]:
    yield from zip(runs, lines(len(runs)), strict=True)


def _as(line: Line) -> dict[str, Any]:
    return {"color": line.colour, "linestyle": line.dash}


def _legend(figure: Figure, runs: Stories) -> None:
    if len(runs) < 2:
        return
    # By name one by one: of lines that are found matplotlib leaves out those named _something.
    handles = [Line2D([], [], **_as(line)) for _, line in _drawn(runs)]
    names = [run.name for run in runs]
    figure.legend(handles, names, loc="outside lower center", ncols=2)
