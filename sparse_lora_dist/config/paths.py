"""Where "default", a path or a hub id points, and what is not there. Nothing is opened."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparse_lora_dist.config.sections import DataConfig

ASSETS = Path(__file__).parents[2] / "assets"
EMBEDDED = {
    "model": "base",
    "data": "gsm8k/train.jsonl",
    "eval_data": "gsm8k/heldout.jsonl",
}
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
DATA_SUFFIXES = (".jsonl", ".json", ".parquet", ".txt", ".csv", ".tsv")


def resolve_default(option: str, value: str) -> str:
    """Path of what the repository brings for "default"; any other value as it is."""
    return str(ASSETS / EMBEDDED[option]) if value == "default" else str(Path(value).expanduser())


def eval_source(data: DataConfig) -> str | None:
    """Path or hub id of the held-out set; None when there is none."""
    if data.eval_data is not None:
        return resolve_default("eval_data", data.eval_data)
    return resolve_default("eval_data", "default") if data.data == "default" else None


def missing_locations(flat: Mapping[str, Any]) -> list[str]:
    """One line for each path among the options that leads nowhere."""
    problems = []
    for option in ("model", "data", "eval_data", "init_adapter"):
        if flat[option] is not None:
            problems += missing_source(option, flat[option])
    problems += missing_files(flat)
    if flat["resume"] not in ("auto", "never") and not Path(flat["resume"]).is_dir():
        problems.append(f"resume must be auto, never or an existing folder, got {flat['resume']!r}")
    if Path(flat["output_dir"]).is_file():
        problems.append(f"output_dir is a file, must be a folder: {flat['output_dir']}")
    return problems


def missing_files(flat: Mapping[str, Any]) -> list[str]:
    """One line for each fault of what goes with the model, whether a run trains or not."""
    problems = []
    if flat["chat_template"] is not None and not Path(flat["chat_template"]).expanduser().is_file():
        problems.append(f"chat_template: no such file: {flat['chat_template']}")
    if flat["revision"] is not None and Path(resolve_default("model", flat["model"])).exists():
        problems.append(f"revision is for hub models, but model is a local path: {flat['model']}")
    return problems


def missing_source(option: str, value: str) -> list[str]:
    """A line when ``value`` is neither there nor can be a hub id."""
    embedded = value == "default" and option in EMBEDDED
    path = Path(resolve_default(option, value) if embedded else value).expanduser()
    if path.exists() or not (embedded or looks_local(value)):
        return []
    if embedded:
        return [f"{option}: {path} comes with a git clone only and is not here: give --{option}"]
    return [f"{option}: no such file or folder, and no hub id: {value}"]


def looks_local(value: str) -> bool:
    """Can ``value`` only be a path? Hub ids are ``name`` or ``owner/name``."""
    return (
        value.startswith(("/", ".", "~"))
        or value.endswith(DATA_SUFFIXES)
        or HUB_ID.fullmatch(value) is None
    )
