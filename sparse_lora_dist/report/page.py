"""Stories and their pictures -> one page that asks nobody for anything."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from statistics import median
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from sparse_lora_dist.report.jobs import GOING
from sparse_lora_dist.report.run_data import RunStory
from sparse_lora_dist.report.style import SERIES, Picture, as_svg

GENERATOR = "sparse_lora_dist report"
"""By which the page knows its own kind, and replaces no other."""
DARK = ("#6cb6ff", "#f69d50", "#57ab5a", "#c297ff", "#fc8dc7", "#c6a93f")
"""Colours of series on a dark page, in the order of ``SERIES``."""


@dataclass(frozen=True, kw_only=True)
class Section:
    """Pictures of one run, or of all together, and what is not there."""

    title: str
    pictures: Sequence[Picture]
    absent: Sequence[str] = ()


def write_page(stories: Sequence[RunStory], sections: Sequence[Section]) -> str:
    """The text of the page."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined
    )
    return environment.get_template("page.html.jinja").render(
        title=stories[0].name if len(stories) == 1 else f"{len(stories)} runs",
        generator=GENERATOR,
        now=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        going=[s for s in stories if s.state == GOING],
        stories=stories,
        facts={story.name: overview(story) for story in stories},
        sections=sections,
        as_svg=as_svg,
        light=SERIES,
        dark=DARK,
        options=options(stories),
    )


def overview(story: RunStory) -> dict[str, str]:
    """The lines of the first table."""
    total = "" if story.total_steps is None else f" of {story.total_steps:,}"
    peaks = story.series("peak_memory_bytes")[1]
    return {
        "state": story.state,
        "method": str(story.options.get("method", "?")),
        "model": str(story.options.get("model", "?")),
        "steps": f"{story.last_step:,}{total}",
        "training loss": loss_of(story, "loss"),
        "held-out loss": loss_of(story, "held_out_loss"),
        "live entries": change(story.series("live_entries")[1], digits=0),
        "tokens / s": median_of(story.series("tokens_per_s")[1]),
        "peak memory of a rank": f"{max(peaks) / 1e9:.2f} GB" if peaks else "–",
        "ranks of the job": str(story.world_size or "?"),
        "jobs": str(len(story.attempts)),
        "checkpoints": str(sum(not s.damage for s in story.checkpoints)),
        "steps left out": str(sum(r["kind"] == "left out" for r in story.bad_steps)),
    }


def loss_of(story: RunStory, key: str) -> str:
    """The first and the last, and whether it ended in none."""
    since, values = story.lost_number(key), story.series(key)[1]
    if since is None:
        return change(values)
    none = f"NaN or infinite from step {since:,} on"
    return f"{change(values)}, {none}" if values else none


def change(values: Sequence[float], digits: int = 4) -> str:
    """The first and the last of them."""
    if not values:
        return "–"
    return " → ".join(f"{v:,.{digits}f}" for v in dict.fromkeys((values[0], values[-1])))


def median_of(values: Sequence[float]) -> str:
    """Not the mean: a step that waited for a disk would count as many."""
    return f"{median(values):,.0f}" if values else "–"


def options(stories: Sequence[RunStory]) -> list[tuple[str, list[Any], bool]]:
    """(name, value of each run, do they differ?)"""
    names = dict.fromkeys(name for story in stories for name in story.options)
    rows = [(name, [story.options.get(name, "–") for story in stories]) for name in names]
    return [(name, values, any(v != values[0] for v in values)) for name, values in rows]
