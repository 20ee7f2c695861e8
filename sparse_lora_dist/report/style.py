"""Style of the figures, and their conversion to SVG. In a page, an SVG takes the page's colours,
which are light or dark; PNG files are light."""

import io
import re
from dataclasses import dataclass
from itertools import cycle, islice, product
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter

from sparse_lora_dist.system.atomic_files import write_whole

WIDTH, HEIGHT = 4.6, 2.7
"""Size of a figure in inches, small enough that its text stays readable on a phone."""
TEXT, FAINT = "#1f2328", "#d0d7dd"
"""Colours of text and axes, and of grid lines."""
SERIES = ("#0b66c2", "#c4540a", "#157f3b", "#8250df", "#bf3989", "#6e5a00")
"""Colours of the runs on white, as in PNG files. In a page, ``as_svg`` replaces the colours of
text, grid and runs by those of the page: ``currentColor``, ``var(--faint)``, ``var(--series-0)``.
"""
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
    """Name of the figure's PNG file, without ".png"."""
    title: str
    caption: str
    """Sentences below the figure in the page. PNG files have no caption."""
    figure: Figure


def panels(rows: int = 1, *, height: float | None = None, **options: Any) -> tuple[Figure, Any]:
    """Make a figure with ``rows`` axes below each other.

    Args:
        rows: number of axes.
        height: height of the figure in inches; None: ``HEIGHT`` for each row.
        options: keyword arguments of ``Figure.subplots``.

    Returns:
        The figure, and a 1-D array of its axes, top first.
    """
    figure = Figure(figsize=(WIDTH, height or HEIGHT * rows), layout="constrained")
    axes = figure.subplots(rows, squeeze=False, **options)[:, 0]
    for each in axes:  # few ticks, because the numbers of late steps are wide
        each.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))
    return figure, axes


@dataclass(frozen=True, kw_only=True)
class Line:
    """Colour, dash and marker of one run, in all figures."""

    colour: str
    """Colour as "#rrggbb"."""
    dash: Any = "-"
    """Line style of matplotlib: "-", or (offset, lengths of dashes and gaps)."""
    mark: str = "o"
    """Marker of matplotlib."""


def lines(count: int) -> list[Line]:
    """Return ``count`` line styles. Colours repeat after six, with another dash and marker; all
    repeats after 18."""
    return [
        Line(colour=colour, dash=dash, mark=mark)
        for (dash, mark), colour in islice(cycle(product(DASHES, SERIES)), count)
    ]


def plain_numbers(axes: Any) -> None:
    """Make the y axis of ``axes`` show its numbers in the format 12,000.

    matplotlib's own format for large numbers is math text, which shows as its source here, because
    "text.parse_math" is off.
    """
    axes.yaxis.set_major_formatter(lambda value, place: f"{value:,.10g}")
    axes.yaxis.set_minor_formatter(NullFormatter())


def as_svg(picture: Picture, place: str) -> str:
    """Return a figure as an <svg> element to embed in a page.

    The element uses the colours of the page. matplotlib's metadata is removed, because it has
    addresses of web sites.

    Args:
        picture: the figure.
        place: text that is unique in the page; the ids in the SVG are made from it.
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
    """Return the colours of a page: colour of a figure on white -> its CSS value in a page."""
    series = {colour: f"var(--series-{i})" for i, colour in enumerate(SERIES)}
    return {TEXT: "currentColor", FAINT: "var(--faint)"} | series


def save_png(picture: Picture, path: Path, *, maker: str) -> None:
    """Write a figure as a PNG file, on white and under its title.

    Args:
        picture: the figure.
        path: the file to write.
        maker: text for the field "Software" of the file's metadata, which marks the file as one of
            this program.
    """
    picture.figure.suptitle(picture.title, size=10.5, weight="bold")
    drawn = io.BytesIO()
    picture.figure.savefig(drawn, format="png", dpi=160, metadata={"Software": maker})
    write_whole(path, drawn.getvalue())
