"""A sweep: a YAML file of options, some with several values -> the options of every run."""

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
  FILE    options of launcher/train.py in YAML; where a list stands, each of its values is tried
  NUMBER  print the options of this run, one word a line; without it, all runs are listed"""


@dataclass(frozen=True, kw_only=True)
class Grid:
    """The runs of a file, and which one was asked for."""

    path: str
    runs: dict[str, list[str]]
    """Options of every run, as words of a command line, by the name of its folder."""
    number: int | None
    run: RunConfig = field(default_factory=RunConfig)


def load_grid(argv: Sequence[str]) -> Grid:
    """What ``argv`` asks.

    Raises:
        UserError: the file is no grid, a run of it could not start, or there is no such run.
    """
    if len(argv) not in (1, 2) or argv[0].startswith("-"):
        raise UserError(USAGE)
    path = argv[0]
    runs = runs_of(read(Path(path)))
    check(path, runs)
    number = None if len(argv) == 1 else _number(argv[1], len(runs))
    return Grid(path=path, runs=runs, number=number)


def read(path: Path) -> dict[str, str | list[str]]:
    """Values as they are written: ``2e-4`` and ``true`` go to the command line as they stand."""
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict) or any(isinstance(v, dict) for v in content.values()):
        raise UserError(f"{path} must hold 'name: value' or 'name: [value, value]' lines.")
    return content


def runs_of(grid: dict[str, str | list[str]]) -> dict[str, list[str]]:
    """Every combination, the last list changing fastest.

    Raises:
        UserError: two of them would have the same folder.
    """
    lists = {name: value for name, value in grid.items() if isinstance(value, list)}
    fixed = {name: value for name, value in grid.items() if isinstance(value, str)}
    parent = fixed.pop("output_dir", "runs/grid")
    runs: dict[str, list[str]] = {}
    for values in product(*lists.values()):
        chosen = dict(zip(lists, map(_text, values), strict=True))
        name = _folder(chosen)
        if name in runs:
            raise UserError(f"two runs of the grid would share the folder {parent}/{name}.")
        options = fixed | chosen | {"output_dir": f"{parent}/{name}"}
        runs[name] = [word for key, value in options.items() for word in (f"--{key}", value)]
    return runs


def _text(value: str | list[str]) -> str:
    """A list among the values is one value, of an option that takes several names."""
    return ",".join(value) if isinstance(value, list) else value


def _folder(chosen: dict[str, str]) -> str:
    """method=lora,rank=8, without what a file's name had better not hold."""
    text = ",".join(f"{name}={value}" for name, value in chosen.items())
    return re.sub(r"[^\w.,=+-]+", "-", text) or "run"


def check(path: str, runs: dict[str, list[str]]) -> None:
    """Raises UserError where the options of a run are wrong: before anything is queued."""
    if not runs:
        raise UserError(f"{path} describes no run: one of its lists is empty.")
    for name, flags in runs.items():
        try:
            load_config(flags)
        except ConfigError as error:
            raise UserError(f"{path}, run {name}: {error}") from error


def _number(text: str, count: int) -> int:
    if not text.isdecimal() or int(text) >= count:
        raise UserError(
            f"the grid has {count} runs, 0 to {count - 1}, got {text}: sbatch --array=0-{count - 1}"
        )
    return int(text)


def show(grid: Grid) -> None:
    """Print the run that was asked for, or all."""
    if grid.number is not None:
        print("\n".join(list(grid.runs.values())[grid.number]))
        return
    for number, name in enumerate(grid.runs):
        print(f"{number:>4}  {name}")
    last = len(grid.runs) - 1
    print(f"all of them: sbatch --array=0-{last} slurm/train_array.sbatch {grid.path}")
