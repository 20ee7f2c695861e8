"""Makes the HTML page of a report. The page embeds its figures, loads nothing from the network and
runs no script.

The head of a page has a line with a SHA-256 hash of the rest of the page. It tells a page that this
program wrote, and nobody has changed since, from any other file."""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from statistics import median
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from sparse_lora_dist.report.jobs import GOING
from sparse_lora_dist.report.run_data import RunData
from sparse_lora_dist.report.style import SERIES, Picture, as_svg

GENERATOR = "sparse_lora_dist report"
"""Text that marks every page and PNG file that this program writes."""
MARK = f'<meta name="generator" content="{GENERATOR}">\n'
"""Line in the head of every page. The line with the hash follows it."""
SEAL = re.compile(rb'<meta name="sha256" content="([0-9a-f]{64})">\n')
HEAD_BYTES = 1000
"""Number of bytes at the beginning of a page that hold its mark and its hash."""
DARK = ("#6cb6ff", "#f69d50", "#57ab5a", "#c297ff", "#fc8dc7", "#c6a93f")
"""Colours that replace those of ``SERIES``, in the same order, on a dark page."""


@dataclass(frozen=True, kw_only=True)
class Section:
    """A section of the page: the figures of one run, or those that all runs share."""

    title: str
    pictures: Sequence[Picture]
    """Figures, in the order in which the page shows them."""
    absent: Sequence[str] = ()
    """Sentences that say why a figure is missing, one for each missing figure."""


def write_page(runs: Sequence[RunData], sections: Sequence[Section]) -> str:
    """Return the HTML of the page, with a hash of itself in its head.

    Args:
        runs: the runs of the report, for the tables of results and options.
        sections: the figures, in the order in which the page shows them.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined
    )
    page = environment.get_template("page.html.jinja").render(
        title=runs[0].name if len(runs) == 1 else f"{len(runs)} runs",
        generator=GENERATOR,
        now=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        going=[s for s in runs if s.state == GOING],
        runs=runs,
        overviews={run.name: overview(run) for run in runs},
        sections=sections,
        as_svg=as_svg,
        light=SERIES,
        dark=DARK,
        options=options(runs),
    )
    return seal(page)


def seal(page: str) -> str:
    """Return a page with a hash of itself in its head.

    Args:
        page: the HTML of the page, with the line ``MARK``.
    """
    digest = hashlib.sha256(page.encode()).hexdigest()
    return page.replace(MARK, f'{MARK}<meta name="sha256" content="{digest}">\n', 1)


def is_own_page(content: bytes) -> bool:
    """Return True if this program wrote a page and nobody has changed it since.

    Of pages without a hash, as versions before wrote them, the mark alone counts.

    Args:
        content: the bytes of the file.
    """
    head = content[:HEAD_BYTES]
    if MARK.encode() not in head:
        return False
    found = SEAL.search(head)
    if found is None:
        return True
    rest = content[: found.start()] + content[found.end() :]
    return hashlib.sha256(rest).hexdigest().encode() == found[1]


def overview(run: RunData) -> dict[str, str]:
    """Return the results of a run for the table at the top of the page: label of a line -> text."""
    total = "" if run.total_steps is None else f" of {run.total_steps:,}"
    peaks = run.series("peak_memory_bytes")[1]
    return {
        "state": run.state,
        "method": str(run.options.get("method", "?")),
        "model": str(run.options.get("model", "?")),
        "steps": f"{run.last_step:,}{total}",
        "training loss": loss_of(run, "loss"),
        "held-out loss": loss_of(run, "held_out_loss"),
        "live entries": change(run.series("live_entries")[1], digits=0),
        "tokens / s": median_of(run.series("tokens_per_s")[1]),
        "peak memory of a rank": f"{max(peaks) / 1e9:.2f} GB" if peaks else "–",
        "ranks of the job": str(run.world_size or "?"),
        "jobs": str(len(run.attempts)),
        "checkpoints": str(sum(not s.damage for s in run.checkpoints)),
        "steps left out": str(sum(r["kind"] == "left out" for r in run.bad_steps)),
    }


def loss_of(run: RunData, key: str) -> str:
    """Return the first and last value of a metric as text, and from which step on it is NaN or
    infinite: "5.0000 → 4.0000, NaN or infinite from step 4 on".

    Args:
        run: the run.
        key: name of the metric in metrics.jsonl, such as "loss".
    """
    since, values = run.non_finite_since(key), run.series(key)[1]
    if since is None:
        return change(values)
    lost = f"NaN or infinite from step {since:,} on"
    return f"{change(values)}, {lost}" if values else lost


def change(values: Sequence[float], digits: int = 4) -> str:
    """Return the first and the last value as text: "4.9012 → 3.0010".

    Equal values are written once; no value gives "–". ``digits`` is the number of decimals.
    """
    if not values:
        return "–"
    return " → ".join(f"{v:,.{digits}f}" for v in dict.fromkeys((values[0], values[-1])))


def median_of(values: Sequence[float]) -> str:
    """Return the median as text, rounded to an integer; "–" if there is no value.

    It is not the mean, because one step that waited for a disk would distort the mean.
    """
    return f"{median(values):,.0f}" if values else "–"


def options(runs: Sequence[RunData]) -> list[tuple[str, list[Any], bool]]:
    """Return all options of the runs side by side, for the table of options on the page.

    Returns:
        For each option: its name, its value in each run ("–" if the run lacks it), and True if the
        values differ.
    """
    names = dict.fromkeys(name for run in runs for name in run.options)
    rows = [(name, [run.options.get(name, "–") for run in runs]) for name in names]
    return [(name, values, any(v != values[0] for v in values)) for name, values in rows]
