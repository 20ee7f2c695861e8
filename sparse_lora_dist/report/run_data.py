"""A run folder -> its run. Nothing is written, so a run may still be going."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import yaml

from sparse_lora_dist.errors import UserError
from sparse_lora_dist.report.jobs import Attempt, jobs_of
from sparse_lora_dist.report.jsonl import (
    Record,
    check_sites,
    is_attempt,
    is_bad_step,
    is_count,
    is_decision,
    is_metrics,
    is_stage,
    no_constant,
    read_lines,
)
from sparse_lora_dist.report.saved_steps import Saved, saved_in
from sparse_lora_dist.run_folder import lock as run_lock
from sparse_lora_dist.run_folder.attempts import NAME as ATTEMPTS
from sparse_lora_dist.run_folder.description import RUN_YAML

STAGE = ("live_ranks", "held_out_loss", "lambda")
"""Numbers that a stage is drawn by."""


@dataclass(frozen=True, kw_only=True)
class RunData:
    """What a run folder says."""

    name: str
    folder: Path
    options: Mapping[str, Any]
    environment: Mapping[str, Any]
    metrics: Sequence[Record]
    decisions: Sequence[Record]
    stages: Sequence[Record]
    """That have all numbers to be drawn by."""
    bad_steps: Sequence[Record]
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

    @property
    def world_size(self) -> int | None:
        """Ranks of the newest job; None where nobody wrote that down."""
        size = self.environment.get("world_size")
        return int(size) if is_count(size) and size else None

    def lost_number(self, key: str) -> int | None:
        """The step from which on a number of the metrics is none to the end; None where it ends as
        a number."""
        rows = [row for row in self.metrics if key in row]
        ends = list(takewhile(lambda row: row[key] is None, reversed(rows)))
        return int(ends[-1]["step"]) if ends else None

    def series(self, key: str) -> tuple[list[int], list[float]]:
        """Steps and values of a number of the metrics, where it has one."""
        rows = [row for row in self.metrics if row.get(key) is not None]
        return [row["step"] for row in rows], [row[key] for row in rows]

    def facts(self) -> list[str]:
        """Numbers that the method says of itself: budget, keep, lambda."""
        return sorted({key for row in self.decisions for key in row} - {"step", "ranks", "live"})


def read_run(folder: Path, name: str | None = None) -> RunData:
    """What ``folder`` holds.

    Raises:
        UserError: it is no run, or a file of it is missing or damaged.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder; give the --output_dir of a run.")
    if not (folder / RUN_YAML).exists():
        raise UserError(f"{folder} is no run: it has no run.yaml. Give the --output_dir of a run.")
    going = run_lock.is_held(folder)
    metrics = _metrics(folder / "metrics.jsonl", going=going)
    begun = _optional(folder / ATTEMPTS, is_attempt)
    decisions = _optional(folder / "decisions.jsonl", is_decision)
    check_sites(folder / "decisions.jsonl", decisions)
    ended = _optional(folder / "stages.jsonl", is_stage)
    return RunData(
        name=name or folder.resolve().name,
        folder=folder,
        options=_mapping(folder / RUN_YAML, yaml.safe_load),
        environment=_mapping(folder / "environment.json", _json),
        metrics=metrics,
        decisions=decisions,
        stages=[row for row in ended if all(row.get(name) is not None for name in STAGE)],
        bad_steps=_optional(folder / "bad_steps.jsonl", is_bad_step),
        attempts=jobs_of(begun, metrics, going=going),
        checkpoints=saved_in(folder / "checkpoints"),
        total_steps=next((r["total_steps"] for r in reversed(begun) if "total_steps" in r), None),
    )


def _metrics(path: Path, *, going: bool) -> list[Record]:
    # A job that loads has the lock, but no such file yet.
    rows = read_lines(path, is_metrics) if path.exists() or not going else []
    if not rows:
        raise UserError(f"{path} has no line yet: wait for the first step.")
    return rows


def _optional(path: Path, is_row: Callable[[Record], bool]) -> list[Record]:
    return read_lines(path, is_row) if path.exists() else []


def _mapping(path: Path, parse: Callable[[str], Any]) -> Mapping[str, Any]:
    try:
        content = parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold names and values.")
    return content


def _json(text: str) -> Any:
    return json.loads(text, parse_constant=no_constant)
