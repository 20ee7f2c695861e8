"""How figures look, and a figure as text of a page that follows its colours, light or dark."""

import io
import re
from dataclasses import dataclass
from itertools import cycle, islice, product
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter

WIDTH, HEIGHT = 4.6, 2.7
"""Inches. So small that text stays readable where a phone shrinks it."""
TEXT, FAINT = "#1f2328", "#d0d7dd"
SERIES = ("#0b66c2", "#c4540a", "#157f3b", "#8250df", "#bf3989", "#6e5a00")
"""On white, as PNG files have it. In a page these stand for the page's own: ``currentColor``,
``var(--faint)``, ``var(--series-0)`` ..."""
DASHES = (("-", "o"), ((0, (5, 1.5)), "s"), ((0, (5, 1.5, 1, 1.5)), "^"))
"""Of lines that have the same colour, and the marks that go with them."""

matplotlib.rcParams.update(
    {
        "svg.fonttype": "none",  # text stays text, in the page's font
        "text.parse_math": False,  # a run may be called $\\foo$
        "font.size": 9,
        "axes.titlesize": 9.5,
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.linewidth": 0.6,
        "legend.frameon": False,
        "legend.fontsize": 8.5,
        "grid.color": FAINT,
        **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), TEXT),
        "axes.edgecolor": TEXT,
    }
)


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A figure and what stands around it."""

    name: str
    """Of its PNG file."""
    title: str
    caption: str
    figure: Figure


def panels(rows: int = 1, *, height: float | None = None, **options: Any) -> tuple[Figure, Any]:
    """A figure and its axes, below each other: [rows]."""
    figure = Figure(figsize=(WIDTH, height or HEIGHT * rows), layout="constrained")
    axes = figure.subplots(rows, squeeze=False, **options)[:, 0]
    for each in axes:  # few ticks: steps of long runs are wide
        each.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))
    return figure, axes


@dataclass(frozen=True, kw_only=True)
class Line:
    """How all that is drawn of a run looks."""

    colour: str
    dash: Any = "-"
    mark: str = "o"


def lines(count: int) -> list[Line]:
    """One a run. Colours come again after six, with another dash and mark."""
    return [
        Line(colour=colour, dash=dash, mark=mark)
        for (dash, mark), colour in islice(cycle(product(DASHES, SERIES)), count)
    ]


def plain_numbers(axes: Any) -> None:
    """12,000 beside the y axis, not 1.2e4; and no mathematics, which is not read here."""
    axes.yaxis.set_major_formatter(lambda value, place: f"{value:,.10g}")
    axes.yaxis.set_minor_formatter(NullFormatter())


def as_svg(picture: Picture, place: str) -> str:
    """An <svg> for inside a page: it names no address, and no colour of its own. ``place``, unlike
    that of any other picture of the page, makes its ids unlike theirs."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": place}):
        # dpi is that of what is drawn as pixels: heat maps.
        picture.figure.savefig(buffer, format="svg", transparent=True, dpi=200)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    asked_for = set(re.findall(r"#([^\s\"')]+)", svg))
    svg = re.sub(r' id="([^"]*)"', lambda id: id[0] if id[1] in asked_for else "", svg)
    svg = re.sub(r' (width|height)="[\d.]+pt"', "", svg, count=2)
    for colour, instead in _page_colours().items():
        svg = svg.replace(colour, instead)
    return svg.replace("<svg", f'<svg role="img" aria-label="{picture.title}"', 1)


def _page_colours() -> dict[str, str]:
    series = {colour: f"var(--series-{i})" for i, colour in enumerate(SERIES)}
    return {TEXT: "currentColor", FAINT: "var(--faint)"} | series


def save_png(picture: Picture, path: Path, *, maker: str) -> None:
    """The figure in a file, on white, under its title; the file says who made it."""
    picture.figure.suptitle(picture.title, size=10.5, weight="bold")
    picture.figure.savefig(path, dpi=160, metadata={"Software": maker})
