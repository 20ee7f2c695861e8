"""A run folder -> its story. Nothing is written, so a run may still be going."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from sparse_lora_dist import run_lock
from sparse_lora_dist.attempts import NAME as ATTEMPTS
from sparse_lora_dist.checkpoint import published, read_manifest
from sparse_lora_dist.errors import UserError
from sparse_lora_dist.report.lines import (
    Row,
    is_attempt,
    is_bad_step,
    is_decision,
    is_metrics,
    is_stage,
    read_lines,
)

GOING = "still going"


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One job's part of a run."""

    first: int
    last: int
    """Steps that it began from and came to."""
    began: float | None
    """Seconds since 1970."""
    seconds: float | None
    """How long it trained; None where nobody wrote that down."""
    world_size: int | None
    ended: str


@dataclass(frozen=True, kw_only=True)
class Saved:
    """A published checkpoint."""

    path: Path
    manifest: Mapping[str, Any]
    """Empty where it is damaged."""
    damage: str | None = None

    @property
    def step(self) -> int:
        return int(self.path.name.removeprefix("step_"))

    @property
    def peaks(self) -> list[int]:
        """Peak memory of every rank until then; empty where that was not written down."""
        files = self.manifest.get("files", [])
        return [f["peak_memory_bytes"] for f in files if "peak_memory_bytes" in f]


@dataclass(frozen=True, kw_only=True)
class RunStory:
    """What a run folder says."""

    name: str
    folder: Path
    options: Mapping[str, Any]
    environment: Mapping[str, Any]
    metrics: Sequence[Row]
    decisions: Sequence[Row]
    stages: Sequence[Row]
    """That have a held-out loss."""
    bad_steps: Sequence[Row]
    attempts: Sequence[Attempt]
    checkpoints: Sequence[Saved]
    total_steps: int | None

    @property
    def last_step(self) -> int:
        return int(self.metrics[-1]["step"])

    @property
    def state(self) -> str:
        """How it stands: finished, still going, stopped by ..., cut short."""
        return self.attempts[-1].ended

    def series(self, key: str) -> tuple[list[int], list[float]]:
        """Steps and values of a number of the metrics, where it has one."""
        rows = [row for row in self.metrics if row.get(key) is not None]
        return [row["step"] for row in rows], [row[key] for row in rows]

    def facts(self) -> list[str]:
        """Numbers that the method says of itself: budget, keep, lambda."""
        return sorted({key for row in self.decisions for key in row} - {"step", "ranks", "live"})


def read_story(folder: Path, name: str | None = None) -> RunStory:
    """What ``folder`` holds.

    Raises:
        UserError: it is no run, or a file of it is missing or damaged.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder; give the --output_dir of a run.")
    if not (folder / "run.yaml").exists():
        raise UserError(f"{folder} is no run: it has no run.yaml. Give the --output_dir of a run.")
    metrics = read_lines(folder / "metrics.jsonl", is_metrics)
    if not metrics:
        raise UserError(f"{folder / 'metrics.jsonl'} has no line yet: wait for the first step.")
    begun = _optional(folder / ATTEMPTS, is_attempt)
    return RunStory(
        name=name or folder.resolve().name,
        folder=folder,
        options=_mapping(folder / "run.yaml", yaml.safe_load),
        environment=_mapping(folder / "environment.json", json.loads),
        metrics=metrics,
        decisions=_optional(folder / "decisions.jsonl", is_decision),
        stages=[
            row
            for row in _optional(folder / "stages.jsonl", is_stage)
            if row["held_out_loss"] is not None
        ],
        bad_steps=_optional(folder / "bad_steps.jsonl", is_bad_step),
        attempts=_attempts(begun, metrics, going=run_lock.is_held(folder)),
        checkpoints=_checkpoints(folder / "checkpoints"),
        total_steps=next((r["total_steps"] for r in reversed(begun) if "total_steps" in r), None),
    )


def _optional(path: Path, is_row: Callable[[Row], bool]) -> list[Row]:
    return read_lines(path, is_row) if path.exists() else []


def _mapping(path: Path, parse: Callable[[str], Any]) -> Mapping[str, Any]:
    try:
        content = parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold names and values.")
    return content


def _attempts(rows: Sequence[Row], metrics: Sequence[Row], *, going: bool) -> list[Attempt]:
    """Each beginning with its end, or, where a job did not live to write one, what the next one
    found."""
    now = GOING if going else "cut short"
    if not rows or rows[0]["event"] != "begins":  # of a version that did not write attempts
        how = GOING if going else "not written down"
        first, last = metrics[0]["step"], metrics[-1]["step"]
        return [
            Attempt(first=first, last=last, began=None, seconds=None, world_size=None, ended=how)
        ]
    found = []
    for row, following in zip(rows, [*rows[1:], None], strict=True):
        if row["event"] != "begins":
            continue
        if following is None:
            last, end, ended = metrics[-1]["step"], None, now
        elif following["event"] == "begins":
            last, end, ended = following["reached"], None, "cut short"
        else:
            why = following.get("why")
            last, end = following["step"], following["time"]
            ended = f"{following['event']} by {why}" if why else following["event"]
        found.append(
            Attempt(
                first=row["step"],
                last=last,
                began=row["time"],
                seconds=None if end is None else end - row["time"],
                world_size=row["world_size"],
                ended=ended,
            )
        )
    return found


def _checkpoints(folder: Path) -> list[Saved]:
    found = []
    for path in published(folder):
        try:
            found.append(Saved(path=path, manifest=read_manifest(path)))
        except FileNotFoundError:  # --keep_last has just removed it
            continue
        except (UserError, OSError) as error:
            found.append(Saved(path=path, manifest={}, damage=str(error)))
    return found
