"""Resolve "default", paths and hub ids in options, and find paths that do not exist.

"default" stands for the model and data that come with the package. No file is opened, and the
Hugging Face hub is not asked.
"""

import os
import re
from argparse import ArgumentTypeError
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sparse_lora_dist.config.sections import DataConfig
from sparse_lora_dist.errors import UserError
from sparse_lora_dist.system.machine_errors import of_path
from sparse_lora_dist.system.own_files import MARKER
from sparse_lora_dist.system.shipped import ASSETS

EMBEDDED = {
    "model": "base",
    "data": "gsm8k/train.jsonl",
    "eval_data": "gsm8k/heldout.jsonl",
}
"""{option: path in ASSETS that "default" stands for}."""
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
"""Hub ids are ``name`` or ``owner/name``."""
DATA_SUFFIXES = (".jsonl", ".json", ".parquet", ".txt", ".csv", ".tsv")
"""Ends of names that are taken for files, not for hub ids."""

PATHS = frozenset(
    """
    model base_cache data eval_data chat_template init_adapter ds_config output_dir resume verify
    edits adapter compare output answers plot config
    """.split()
)
"""Options of all programs whose values are paths, or may be. In all of them ~ is the home."""
LONGEST_NAME, LONGEST_PATH = 255, 4000
"""Largest number of bytes of one name in a path, and of a whole path. A file system refuses longer
names; a path is bounded at 4096, of which the names of a run's own files need some."""


def bad_path(place: str, text: str) -> list[str]:
    """Return a message if a text cannot be the path of a file or folder.

    Args:
        place: The option, with which the message begins.
        text: Its value, not empty.

    Returns:
        A list with the message, or an empty list. Whether the path exists is not checked.
    """
    if "\0" in text or any("\ud800" <= letter <= "\udfff" for letter in text):
        return [f"{place} must be a path in UTF-8 without NUL characters, got {text!r}"]
    if "\n" in text or "\r" in text:
        return [
            f"{place} must be a path without line breaks, got {text!r}. In YAML, | and > add one "
            "at the end: write the path behind the colon"
        ]
    if text.startswith("~") and expanded(text) == text:
        user = text.split("/")[0]
        return [f"{place} {text} cannot be found: there is no user {user[1:]}. Write the path out"]
    if len(text.encode()) > LONGEST_PATH or any(
        len(name.encode()) > LONGEST_NAME for name in text.split("/")
    ):
        return [
            f"{place} is too long: a path has at most {LONGEST_PATH} bytes, and a name in it at "
            f"most {LONGEST_NAME}, got {text[:40]}... of {len(text.encode())} bytes"
        ]
    return []


def real_path(place: str, path: Path) -> Path:
    """Return the absolute path that a path leads to, without symbolic links.

    Args:
        place: The option, with which a message begins.
        path: The path, which need not exist.

    Raises:
        UserError: A link leads back to itself, the current folder was removed, or the path leads
            to one whose name is not UTF-8, which pages and model cards cannot name.
    """
    try:
        found = path.resolve()
    except (OSError, RuntimeError) as error:
        if (said := of_path(error)) is None:
            raise
        raise UserError(f"{place} {path} cannot be used: {said}") from error
    if any("\ud800" <= letter <= "\udfff" for letter in str(found)):
        raise UserError(
            f"{place} {ascii(str(path))} leads to {ascii(str(found))}, whose name is not UTF-8. "
            "Rename it, or choose another path."
        )
    return found


def expanded(text: str) -> str:
    """Return a path with ~ at its beginning replaced by the home of the user, or of the user whose
    name follows. If there is no such user, ``text`` is returned unchanged."""
    return os.path.expanduser(text)


def path_argument(text: str) -> Path:
    """Return the path of a word on the command line, for ``type`` of an argparse argument.

    Raises:
        ArgumentTypeError: The word is empty or cannot be a path.
    """
    if not text.strip():
        raise ArgumentTypeError("it is empty. (A shell variable that is not set gives that.)")
    if problems := bad_path("the path", text):
        raise ArgumentTypeError(problems[0])
    return Path(expanded(text))


def resolve_default(option: str, value: str) -> str:
    """Return the path or hub id that the value of --model, --data or --eval_data stands for.

    Args:
        option: Name of the option.
        value: "default", a path or a hub id.

    Returns:
        The path in the package for "default"; otherwise ``value`` with ~ expanded.
    """
    return str(ASSETS / EMBEDDED[option]) if value == "default" else str(Path(expanded(value)))


def eval_source(data: DataConfig) -> str | None:
    """Return the path or hub id of the held-out data, or None if there is none.

    Without --eval_data there is none, unless --data is "default".

    Args:
        data: The data section of the options.
    """
    if data.eval_data is not None:
        return resolve_default("eval_data", data.eval_data)
    return resolve_default("eval_data", "default") if data.data == "default" else None


def moved_run(flags: Sequence[tuple[str, list[str]]], values: Mapping[str, Any]) -> str | None:
    """Return the folder of a run that is resumed by its own run.yaml and lies in another place now.

    A run.yaml names the folder in which the run began. If the run folder was moved or copied, the
    run goes on where its run.yaml lies.

    Args:
        flags: Flags of the command line.
        values: {option: parsed value} that the user gave.

    Returns:
        The folder of the run.yaml that ``--config`` names; None if it is not in a run folder, if it
        names this folder, if ``--output_dir`` was typed, or if this run is not the one that is
        resumed, with ``--resume auto`` or one of its checkpoints.
    """
    files = [words[0] for name, words in flags if name == "config" and len(words) == 1]
    typed = any(name == "output_dir" for name, _ in flags)
    resume = values.get("resume")
    if not files or typed or resume in (None, "never") or "output_dir" not in values:
        return None
    path = Path(expanded(files[0]))
    checkpoints = path.resolve().parent / "checkpoints"
    if resume != "auto" and not lies_in(Path(expanded(str(resume))), checkpoints):
        return None
    is_run = path.name == "run.yaml" and any(
        (path.parent / name).exists() for name in (MARKER, "checkpoints")
    )
    is_there = Path(str(values["output_dir"])).resolve() == path.parent.resolve()
    return str(path.parent) if is_run and not is_there else None


def where_it_goes_on(began: str, folder: str) -> str:
    """Return a note about a run that goes on in another folder than its run.yaml names.

    Args:
        began: output_dir of its run.yaml.
        folder: folder in which the run.yaml lies, from ``moved_run``.
    """
    path, now = Path(expanded(began)), Path(folder).resolve()
    parts = tuple(part for part in Path(os.path.normpath(path)).parts if part != "..")
    if not path.is_absolute() and now.parts[len(now.parts) - len(parts) :] == parts:
        return (
            f"the run goes on in {now}: its output_dir {began} is relative to the working "
            "directory in which it began, and this is another"
        )
    return f"the run of {began} was moved, and goes on in {folder}"


def lies_in(checkpoint: Path, folder: Path) -> bool:
    """Return True if a checkpoint is one of those in a folder, also if it is a link to another
    disk, or if a link leads to it."""
    return folder.resolve() in (checkpoint.parent.resolve(), checkpoint.resolve().parent)


def _cache_in_run(flat: Mapping[str, Any]) -> list[str]:
    """Return a message if a new run's folder, which must be empty, would hold the base cache."""
    if flat["base_cache"] is None:
        return []
    folder = Path(expanded(str(flat["output_dir"]))).resolve()
    cache = Path(expanded(str(flat["base_cache"]))).resolve()
    if folder not in cache.parents or (folder / "run.yaml").exists():
        return []
    return [
        f"--base_cache {flat['base_cache']} lies in --output_dir {flat['output_dir']}, which must "
        "be empty when a run begins. Choose a folder beside it"
    ]


def missing_locations(flat: Mapping[str, Any]) -> list[str]:
    """Return a message for each path among the options of a run that does not exist.

    Args:
        flat: {option: value} of all options.
    """
    problems = []
    for option in ("model", "data", "eval_data", "init_adapter"):
        if flat[option] is None or (option == "init_adapter" and _resumes(flat)):
            continue  # a checkpoint holds all that a run has got from its first adapter
        problems += missing_source(option, flat[option])
    problems += missing_files(flat) + _cache_in_run(flat)
    if flat["resume"] not in ("auto", "never") and not Path(flat["resume"]).is_dir():
        problems.append(
            f"--resume must be auto, never or an existing folder, got {flat['resume']!r}"
        )
    if Path(flat["output_dir"]).is_file():
        problems.append(f"--output_dir must be a folder, got the file {flat['output_dir']}")
    return problems


def _resumes(flat: Mapping[str, Any]) -> bool:
    """Return True if a run of these options goes on from a checkpoint, as far as names tell."""
    steps = Path(expanded(flat["output_dir"])) / "checkpoints"
    is_there = any(steps.glob("step_*/manifest.json"))
    return bool(flat["resume"] != "never" and (flat["resume"] != "auto" or is_there))


def missing_files(flat: Mapping[str, Any]) -> list[str]:
    """Check --chat_template and --revision, which every program takes.

    Args:
        flat: {option: value} of all options.

    Returns:
        Messages: one if the template does not exist, and one if a revision is given for a local
            model.
    """
    problems = []
    if flat["chat_template"] is not None and not Path(expanded(flat["chat_template"])).is_file():
        is_folder = Path(expanded(flat["chat_template"])).is_dir()
        found = "is a folder" if is_folder else "does not exist"
        problems.append(
            f"--chat_template {flat['chat_template']} {found}. Name a file with a Jinja template"
        )
    if flat["revision"] is not None and Path(resolve_default("model", flat["model"])).exists():
        problems.append(
            f"--revision is for hub models, but --model is the local path {flat['model']}. Leave "
            "--revision out"
        )
    return problems


def missing_source(option: str, value: str) -> list[str]:
    """Return a message if a model, an adapter or data cannot exist.

    Args:
        option: Name of the option.
        value: "default", a path or a hub id. Hub ids are not looked up.

    Returns:
        A list with the message if ``value`` is a path that does not exist, or an empty list.
    """
    embedded = value == "default" and option in EMBEDDED
    path = Path(resolve_default(option, value) if embedded else expanded(value))
    if path.exists() or not (embedded or looks_local(value)):
        return []
    if embedded:
        return [
            f"--{option} is not set, and its default {path} is missing, which comes with the "
            f"package. Install it again, or set --{option}"
        ]
    return [f"--{option} {value} does not exist, and is not a hub id. Check the path"]


def looks_local(value: str) -> bool:
    """Return True if ``value`` can only be a path.

    That is so if it does not have the form of a hub id, ``name`` or ``owner/name``, or if it begins
    like a path or ends like a data file.
    """
    return (
        value.startswith(("/", ".", "~"))
        or value.endswith(DATA_SUFFIXES)
        or HUB_ID.fullmatch(value) is None
    )


def with_commas(parts: Sequence[str]) -> tuple[str, ...]:
    """Return the paths in a list that was split at commas, of which some may have commas in their
    names, as the runs of a sweep do (rank=8,seed=0).

    Args:
        parts: the parts. Neighbours are joined if a file or folder has the joined name.
    """
    found, start = list[str](), 0
    while start < len(parts):
        ends = range(len(parts), start, -1)
        joined = {end: ",".join(parts[start:end]).strip() for end in ends}
        end = next((e for e, path in joined.items() if Path(expanded(path)).exists()), start + 1)
        found.append(joined[end])
        start = end
    return tuple(found)
