"""Reads a run folder for the report. It writes nothing, so the run may still be going."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import yaml

from sparse_lora_dist.config.yaml_file import parse_yaml
from sparse_lora_dist.errors import UserError
from sparse_lora_dist.report.jobs import Attempt, jobs_of
from sparse_lora_dist.report.jsonl import (
    Record,
    by_step,
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
from sparse_lora_dist.report.saved_steps import SavedStep, saved_steps
from sparse_lora_dist.run_folder import lock as run_lock
from sparse_lora_dist.run_folder.attempts import NAME as ATTEMPTS
from sparse_lora_dist.run_folder.description import RUN_YAML
from sparse_lora_dist.run_folder.metrics_file import of_the_same_rows
from sparse_lora_dist.system.small_files import parse_json, refuse_pipes_in

STAGE = ("live_ranks", "held_out_loss", "lambda")
"""Fields of a record of stages.jsonl that the figure of stages needs to draw a point. The record is
the JSON object of one line, and describes one stage: a part of a run with a learning-rate schedule
of its own."""

NOT_BY_STEP = (
    "its records are not in the order of their steps, or a step has several. The report has them "
    "by step, and the last of each step"
)


@dataclass(frozen=True, kw_only=True)
class RunData:
    """The contents of a run folder, checked. A record is the JSON object of one line of a file."""

    name: str
    """Name of the run in the report, unique among the runs of one page."""
    folder: Path
    """The run folder, that is the run's ``--output_dir``."""
    options: Mapping[str, Any]
    """Options of the run: content of run.yaml."""
    environment: Mapping[str, Any]
    """Device, number of ranks and others of the newest job: content of environment.json."""
    metrics: Sequence[Record]
    """Records of metrics.jsonl, at least one."""
    decisions: Sequence[Record]
    """Records of decisions.jsonl, all with the same sites (linears that carry adapters)."""
    stages: Sequence[Record]
    """Records of stages.jsonl that have all fields of ``STAGE``."""
    bad_steps: Sequence[Record]
    """Records of bad_steps.jsonl: steps that were left out, and spikes of the loss."""
    attempts: Sequence[Attempt]
    """Jobs of the run (starts of the training program) in order, at least one."""
    checkpoints: Sequence[SavedStep]
    """Checkpoints that are written in full and not removed, ordered by step."""
    total_steps: int | None
    """Planned length of the run in optimizer steps; None if it is not recorded."""
    notes: Sequence[str] = ()
    """Sentences about what is odd in the files, to print."""

    @property
    def last_step(self) -> int:
        """Last optimizer step that was logged."""
        return int(self.metrics[-1]["step"])

    @property
    def state(self) -> str:
        """State of the newest job: how it ended, or "still going" (``Attempt.ended``)."""
        return self.attempts[-1].ended

    @property
    def world_size(self) -> int | None:
        """Number of ranks of the newest job; None if it is not recorded."""
        size = self.environment.get("world_size")
        return int(size) if is_count(size) and size else None

    def non_finite_since(self, key: str) -> int | None:
        """Return the step from which on a metric is null up to the end of the run.

        A metric that was NaN or infinite is logged as null.

        Args:
            key: name of the metric in metrics.jsonl, such as "loss".

        Returns:
            The step, or None if the last value of the metric is a number, or if it was never
            logged.
        """
        rows = [row for row in self.metrics if key in row]
        ends = list(takewhile(lambda row: row[key] is None, reversed(rows)))
        return int(ends[-1]["step"]) if ends else None

    def series(self, key: str) -> tuple[list[int], list[float]]:
        """Return the logged values of a metric, without those that are null (NaN or infinite).

        Args:
            key: name of the metric in metrics.jsonl, such as "loss".

        Returns:
            The optimizer steps, and the values at these steps.
        """
        rows = [row for row in self.metrics if row.get(key) is not None]
        return [row["step"] for row in rows], [row[key] for row in rows]

    def log_keys(self) -> list[str]:
        """Return the names of the numbers that the method logs with its decisions, such as "budget"
        or "lambda", sorted."""
        return sorted({key for row in self.decisions for key in row} - {"step", "ranks", "live"})


def read_run(folder: Path, name: str | None = None) -> RunData:
    """Read and check all files of a run folder that the report uses.

    Args:
        folder: the ``--output_dir`` of a run, finished or still going.
        name: name of the run in the report. None: the folder's name.

    Records of one file that are out of order are sorted by their steps, and of several of one step
    the last one counts; a note says so.

    Raises:
        UserError: if it is not a run folder, or a file is missing, damaged, or a pipe.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder. Give the --output_dir of a run.")
    refuse_pipes_in(folder)
    if not (folder / RUN_YAML).exists():
        raise UserError(
            f"{folder} has no run.yaml, so it is not a run folder. Give the --output_dir of a run."
        )
    going = run_lock.is_held(folder)
    made_no_step = going or not (folder / ATTEMPTS).exists()
    written = {
        "metrics.jsonl": _metrics(folder / "metrics.jsonl", made_no_step=made_no_step),
        "decisions.jsonl": _optional(folder / "decisions.jsonl", is_decision),
        "stages.jsonl": _optional(folder / "stages.jsonl", is_stage),
    }
    begun = _optional(folder / ATTEMPTS, is_attempt)
    check_sites(folder / "decisions.jsonl", written["decisions.jsonl"])
    ordered = {name: by_step(rows) for name, rows in written.items()}
    metrics, decisions, ended = ordered.values()
    odd = [name for name, rows in written.items() if rows != ordered[name]]
    return RunData(
        name=name or folder.resolve().name,
        folder=folder,
        options=_mapping(folder / RUN_YAML, parse_yaml),
        environment=_mapping(folder / "environment.json", _json),
        metrics=metrics,
        decisions=decisions,
        stages=[row for row in ended if all(row.get(name) is not None for name in STAGE)],
        bad_steps=_optional(folder / "bad_steps.jsonl", is_bad_step),
        attempts=jobs_of(begun, metrics, going=going),
        checkpoints=saved_steps(folder / "checkpoints"),
        notes=[f"{folder / name}: {NOT_BY_STEP}" for name in odd],
        total_steps=next((r["total_steps"] for r in reversed(begun) if "total_steps" in r), None),
    )


def _metrics(path: Path, *, made_no_step: bool) -> list[Record]:
    """Return the records of metrics.jsonl at ``path``; raise UserError if it has none.

    ``made_no_step`` is True if the file may be missing: a job that loads the model has not written
    it, nor has one that ended then.
    """
    rows = [] if made_no_step and not path.exists() else read_lines(path, is_metrics)
    if not rows:
        raise UserError(f"{path} has no record yet. Wait until the first step is logged.")
    return of_the_same_rows(rows)


def _optional(path: Path, is_record: Callable[[Record], bool]) -> list[Record]:
    return read_lines(path, is_record) if path.exists() else []


def _mapping(path: Path, parse: Callable[[str], Any]) -> Mapping[str, Any]:
    """Return the content of the file ``path`` if it is a mapping; raise UserError otherwise.

    ``parse`` is the function that turns the file's text into its content.
    """
    try:
        content = parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(
            f"{path} cannot be read: {' '.join(str(error).split())}. Restore the file from a copy "
            "of the run folder."
        ) from error
    if not isinstance(content, dict):
        raise UserError(
            f"{path} must be a mapping of names to values, got {type(content).__name__}. Restore "
            "the file from a copy of the run folder."
        )
    return content


def _json(text: str) -> Any:
    return parse_json(text, constant=no_constant)
