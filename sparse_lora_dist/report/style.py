"""The look of figures, and their conversion to SVG in the page's light or dark colours."""

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
"""Size of a figure in inches, small enough that its text stays readable on a phone."""
TEXT, FAINT = "#1f2328", "#d0d7dd"
SERIES = ("#0b66c2", "#c4540a", "#157f3b", "#8250df", "#bf3989", "#6e5a00")
"""Colours on white, as in PNG files. In a page ``as_svg`` replaces them by the page's own:
``currentColor``, ``var(--faint)``, ``var(--series-0)`` ..."""
DASHES = (("-", "o"), ((0, (5, 1.5)), "s"), ((0, (5, 1.5, 1, 1.5)), "^"))
"""Dashes and markers that tell lines of the same colour apart."""

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
    """A figure with its title and caption."""

    name: str
    """Name of its PNG file, without the ending."""
    title: str
    caption: str
    figure: Figure


def panels(rows: int = 1, *, height: float | None = None, **options: Any) -> tuple[Figure, Any]:
    """Make a figure with ``rows`` axes below each other; ``height`` is in inches."""
    figure = Figure(figsize=(WIDTH, height or HEIGHT * rows), layout="constrained")
    axes = figure.subplots(rows, squeeze=False, **options)[:, 0]
    for each in axes:  # few ticks, because the numbers of late steps are wide
        each.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))
    return figure, axes


@dataclass(frozen=True, kw_only=True)
class Line:
    """Colour, dash and marker of one run, in all figures."""

    colour: str
    dash: Any = "-"
    mark: str = "o"


def lines(count: int) -> list[Line]:
    """One style per run. Colours repeat after six, with another dash and marker."""
    return [
        Line(colour=colour, dash=dash, mark=mark)
        for (dash, mark), colour in islice(cycle(product(DASHES, SERIES)), count)
    ]


def plain_numbers(axes: Any) -> None:
    """Write numbers of the y axis as 12,000: math text such as 1.2e4 would show as its source."""
    axes.yaxis.set_major_formatter(lambda value, place: f"{value:,.10g}")
    axes.yaxis.set_minor_formatter(NullFormatter())


def as_svg(picture: Picture, place: str) -> str:
    """Return an <svg> element to embed in a page, without addresses and with the page's colours.

    Args:
        place: text that is unique in the page; it makes the ids in the SVG unique.
    """
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": place}):
        # dpi applies to what is rasterized: heat maps.
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
    """Write the figure on white under its title; ``maker`` goes into the file's Software field."""
    picture.figure.suptitle(picture.title, size=10.5, weight="bold")
    picture.figure.savefig(path, dpi=160, metadata={"Software": maker})
