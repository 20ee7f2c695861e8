"""Resolve "default", paths and hub ids, and find those that do not exist. Opens no file."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparse_lora_dist.config.sections import DataConfig

ASSETS = Path(__file__).parents[2] / "assets"
"""Folder with the model and the data that come with the repository."""
EMBEDDED = {
    "model": "base",
    "data": "gsm8k/train.jsonl",
    "eval_data": "gsm8k/heldout.jsonl",
}
"""{option: path in ASSETS that "default" stands for}."""
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
DATA_SUFFIXES = (".jsonl", ".json", ".parquet", ".txt", ".csv", ".tsv")


def resolve_default(option: str, value: str) -> str:
    """Resolve the value of --model, --data or --eval_data.

    Args:
        option: name of the option.
        value: "default", a path or a hub id.

    Returns:
        The path in the repository for "default"; otherwise ``value`` with ~ expanded.
    """
    return str(ASSETS / EMBEDDED[option]) if value == "default" else str(Path(value).expanduser())


def eval_source(data: DataConfig) -> str | None:
    """Return path or hub id of the held-out data; None if there are none."""
    if data.eval_data is not None:
        return resolve_default("eval_data", data.eval_data)
    return resolve_default("eval_data", "default") if data.data == "default" else None


def missing_locations(flat: Mapping[str, Any]) -> list[str]:
    """Return a problem for each path among the options that does not exist.

    Args:
        flat: {option: value} of a run.
    """
    problems = []
    for option in ("model", "data", "eval_data", "init_adapter"):
        if flat[option] is not None:
            problems += missing_source(option, flat[option])
    problems += missing_files(flat)
    if flat["resume"] not in ("auto", "never") and not Path(flat["resume"]).is_dir():
        problems.append(f"resume must be auto, never or an existing folder, got {flat['resume']!r}")
    if Path(flat["output_dir"]).is_file():
        problems.append(f"output_dir must be a folder, got the file {flat['output_dir']}")
    return problems


def missing_files(flat: Mapping[str, Any]) -> list[str]:
    """Return problems of files that every program reads beside the model.

    Args:
        flat: {option: value} of a run.
    """
    problems = []
    if flat["chat_template"] is not None and not Path(flat["chat_template"]).expanduser().is_file():
        problems.append(f"chat_template: no such file: {flat['chat_template']}")
    if flat["revision"] is not None and Path(resolve_default("model", flat["model"])).exists():
        problems.append(f"revision is for hub models, but model is a local path: {flat['model']}")
    return problems


def missing_source(option: str, value: str) -> list[str]:
    """Check that a model, adapter or data set can exist.

    Args:
        option: name of the option.
        value: "default", a path or a hub id. Hub ids are not looked up.

    Returns:
        A list with one problem if ``value`` is a path and does not exist, or an empty list.
    """
    embedded = value == "default" and option in EMBEDDED
    path = Path(resolve_default(option, value) if embedded else value).expanduser()
    if path.exists() or not (embedded or looks_local(value)):
        return []
    if embedded:
        return [f"{option}: {path} is missing; it comes with a git clone only. Set --{option}"]
    return [f"{option}: no such file or folder, and not a hub id: {value}"]


def looks_local(value: str) -> bool:
    """Whether ``value`` can only be a path. Hub ids are ``name`` or ``owner/name``."""
    return (
        value.startswith(("/", ".", "~"))
        or value.endswith(DATA_SUFFIXES)
        or HUB_ID.fullmatch(value) is None
    )
