"""Expand a sweep, a YAML file of options of which some have a list of values, into several runs.

Called by launcher/grid.py. Every combination of the values in lists is one run.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

import yaml

from sparse_lora_dist.config.load import load_config
from sparse_lora_dist.config.sections import RunConfig
from sparse_lora_dist.errors import ConfigError, UserError

USAGE = """usage: launcher/grid.py FILE [NUMBER]
  FILE    options of launcher/train.py in YAML; every combination of values in lists is one run
  NUMBER  print the options of this run, one word per line; without it, all runs are listed"""


@dataclass(frozen=True, kw_only=True)
class Grid:
    """The runs of a sweep, and which of them launcher/grid.py prints."""

    path: str
    """Path of the sweep's YAML file."""
    runs: dict[str, list[str]]
    """{name of the run's folder: its options as words of a command line}, in the order of run
    numbers."""
    number: int | None
    """Number of the run to print, from 0. None: all runs are listed."""
    run: RunConfig = field(default_factory=RunConfig)
    """Options that ``run_program`` reads (--debug)."""


def load_grid(argv: Sequence[str]) -> Grid:
    """Return the sweep that the command line of launcher/grid.py names.

    Args:
        argv: The words after the program's name.

    Raises:
        UserError: The file is not a sweep, the options of a run are wrong, or NUMBER is too large.
    """
    if len(argv) not in (1, 2) or argv[0].startswith("-"):
        raise UserError(USAGE)
    path = argv[0]
    runs = runs_of(read(Path(path)))
    check(path, runs)
    number = None if len(argv) == 1 else _number(argv[1], len(runs))
    return Grid(path=path, runs=runs, number=number)


def read(path: Path) -> dict[str, str | list[str]]:
    """Return the content of a sweep's YAML file, with all values as text.

    Text keeps values such as ``2e-4`` and ``true`` as they are written for the command line.

    Args:
        path: Path of the file.

    Returns:
        {option: value, or list of values}.

    Raises:
        UserError: The file cannot be read, or does not have the form ``name: value``.
    """
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict) or any(isinstance(v, dict) for v in content.values()):
        raise UserError(f"{path} must hold 'name: value' or 'name: [value, value]' lines.")
    return content


def runs_of(grid: dict[str, str | list[str]]) -> dict[str, list[str]]:
    """Expand a sweep into one run for every combination of the values in lists.

    The last list changes fastest: ``{rank: [8, 16], seed: [0, 1]}`` gives the runs rank=8,seed=0;
    rank=8,seed=1; rank=16,seed=0; rank=16,seed=1.

    Args:
        grid: {option: value, or list of values}.

    Returns:
        {name of the run's folder: its options as words of a command line}.

    Raises:
        UserError: Two runs would have the same folder.
    """
    lists = {name: value for name, value in grid.items() if isinstance(value, list)}
    fixed = {name: value for name, value in grid.items() if isinstance(value, str)}
    parent = fixed.pop("output_dir", "runs/grid")
    runs: dict[str, list[str]] = {}
    for values in product(*lists.values()):
        chosen = dict(zip(lists, map(_text, values), strict=True))
        name = _folder(chosen)
        if name in runs:
            raise UserError(
                f"Two runs of the sweep would share the folder {parent}/{name}. Remove one of the "
                "equal values."
            )
        options = fixed | chosen | {"output_dir": f"{parent}/{name}"}
        runs[name] = [word for key, value in options.items() for word in (f"--{key}", value)]
    return runs


def _text(value: str | list[str]) -> str:
    """Return one value of a list as one word of the command line.

    A value that is itself a list, for an option that takes several names, is joined by commas.
    """
    return ",".join(value) if isinstance(value, list) else value


def _folder(chosen: dict[str, str]) -> str:
    """Return the name of a run's folder, e.g. "method=lora,rank=8", without special characters.

    Args:
        chosen: {option: value} of the options that the sweep varies.
    """
    text = ",".join(f"{name}={value}" for name, value in chosen.items())
    return re.sub(r"[^\w.,=+-]+", "-", text) or "run"


def check(path: str, runs: dict[str, list[str]]) -> None:
    """Raise UserError if there is no run, or if the options of a run are wrong.

    Args:
        path: Path of the sweep's file, for messages.
        runs: {name of the run's folder: its options as words of a command line}.
    """
    if not runs:
        raise UserError(
            f"{path} describes no run, because one of its lists is empty. Give each list a value."
        )
    for name, flags in runs.items():
        try:
            load_config(flags)
        except ConfigError as error:
            raise UserError(f"{path}, run {name}: {error}") from error


def _number(text: str, count: int) -> int:
    if not text.isdecimal() or int(text) >= count:
        raise UserError(
            f"NUMBER selects a run of the sweep and must be from 0 to {count - 1}, got {text}. "
            f"Submit the sweep with sbatch --array=0-{count - 1}."
        )
    return int(text)


def show(grid: Grid) -> None:
    """Print the options of run ``grid.number``, one word per line, or a list of all runs if it is
    None."""
    if grid.number is not None:
        print("\n".join(list(grid.runs.values())[grid.number]))
        return
    for number, name in enumerate(grid.runs):
        print(f"{number:>4}  {name}")
    last = len(grid.runs) - 1
    print(f"all of them: sbatch --array=0-{last} slurm/train_array.sbatch {grid.path}")
