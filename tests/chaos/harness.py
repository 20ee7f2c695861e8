"""A run of 40 steps with decisions, evaluations, checkpoints and retention in it, started again
each time it was killed."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparse_lora_dist import checkpoint
from sparse_lora_dist.run_folder.metrics_file import read_records
from tests.fixtures.same_end import check_same
from tests.fixtures.tiny_run import TinyRun
from tests.ranks import RankError, RankPool

RANKS = 2
STEPS, EVERY = 40, 5
OPTIONS: dict[str, Any] = {
    "max_steps": STEPS,
    "method": "increlora",
    "increlora_every": 4,
    "eval_every": 10,
    "save_every": EVERY,
    "keep_last": 2,
    "resume": "auto",
}
OF_THE_LIVING = re.compile("closed by peer|Connection reset|Broken pipe|is gone|no answer")
"""What a survivor says of a rank that was killed."""
GONE = (RankError, EOFError, ConnectionError, BrokenPipeError)


@dataclass
class Story:
    """What became of a run: every kill, and what the run went on from."""

    kills: list[dict[str, Any]] = field(default_factory=list)
    lost_steps: list[int] = field(default_factory=list)
    """Steps that were made before a kill and had to be made again, by kill."""


@contextmanager
def fresh_ranks() -> Iterator[RankPool]:
    """Processes that nothing has happened to."""
    pool = RankPool(RANKS)
    try:
        yield pool
    finally:
        pool.close()


def flags_of(tiny: TinyRun, run: Path) -> list[str]:
    return tiny.flags(run, **OPTIONS)


def attempt(flags: list[str], plan: dict[str, Any] | None) -> bool:
    """Start the run; did it come to its end?"""
    with fresh_ranks() as pool:
        try:
            if plan is None:
                pool.run("tests.work.run:train", flags=flags)
            else:
                pool.run("tests.chaos.moments:train_until", flags=flags, **plan)
        except GONE as death:
            if isinstance(death, RankError) and not OF_THE_LIVING.search(str(death)):
                raise
            return False
    return True


def newest(run: Path) -> int:
    """The step of the newest published checkpoint; 0 with none."""
    found = checkpoint.published(run / "checkpoints")
    return int(found[-1].name.removeprefix("step_")) if found else 0


def reached(run: Path) -> int:
    """The last step that metrics tell of."""
    path = run / "metrics.jsonl"
    rows = read_records(path) if path.exists() else []
    return int(rows[-1]["step"]) if rows else 0


def killed(flags: list[str], run: Path, plan: dict[str, Any], story: Story) -> bool:
    """One attempt that is to be killed; True where the end came first."""
    if attempt(flags, plan):
        return True
    story.kills.append(plan)
    story.lost_steps.append(reached(run) - newest(run))
    return False


def check_end(run: Path, undisturbed: Path) -> None:
    """The end of the undisturbed run, and nothing torn left."""
    check_same(run, undisturbed)
    names = [sorted(p.name for p in (r / "checkpoints").iterdir()) for r in (run, undisturbed)]
    assert names[0] == names[1], names
