"""Expand a sweep, a YAML file of options of which some have a list of values, into several runs.

Called by launcher/grid.py. Every combination of the values in lists is one run.
"""

import re
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from math import prod
from pathlib import Path

from sparse_lora_dist.config.arguments import split_argv
from sparse_lora_dist.config.load import load_config, print_and_exit
from sparse_lora_dist.config.sections import RunConfig
from sparse_lora_dist.config.yaml_file import TextLoader, read_entries
from sparse_lora_dist.errors import ConfigError, UserError
from sparse_lora_dist.system.program_names import as_started_here
from sparse_lora_dist.system.shipped import CONFIG

USAGE = """usage: launcher/grid.py FILE [NUMBER] [--option ...]
  FILE      options of launcher/train.py in YAML; every combination of values in lists is one run
  NUMBER    print the options of this run, one word per line; without it, all runs are listed
  --option  options of launcher/train.py for all runs; they replace those of FILE"""

PRINTING = ("help", "help_all", "print_config", "verify")
"""Flags of launcher/train.py with which it does not train."""
ARRAY = "slurm/train_array.sbatch"
"""Script that runs a sweep as an array of jobs."""
MOST_RUNS = 10_000
"""Largest number of runs of a sweep. Slurm's default bound of an array is 1001 tasks."""


@dataclass(frozen=True, kw_only=True)
class Grid:
    """The runs of a sweep, and which of them launcher/grid.py prints."""

    path: str
    """Path of the sweep's YAML file."""
    runs: dict[str, list[str]]
    """{name of the run's folder: its options as words of a command line}, in the order of run
    numbers."""
    more: Sequence[str] = ()
    """Words of the command line after the file and NUMBER, which every run gets."""
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
    if tuple(argv) in (("--help",), ("-h",)):
        print_and_exit(as_started_here(USAGE))
    begin = next((i for i, word in enumerate(argv) if word.startswith("--")), len(argv))
    (path, *numbers), more = argv[:begin] or [""], argv[begin:]
    if not path or path.startswith("-") or len(numbers) > 1:
        raise UserError(USAGE)
    path = CONFIG.find(path)
    options = read(Path(path))
    _check_more(options, more)
    runs = {name: [*words, *more] for name, words in runs_of(options).items()}
    if not numbers or not runs:  # without a run the check raises
        check(path, runs)
        return Grid(path=path, runs=runs, more=more, number=None)
    number = _number(numbers[0], len(runs))
    name = list(runs)[number]
    check(path, {name: runs[name]})  # the others were checked before the array was submitted
    return Grid(path=path, runs=runs, more=more, number=number)


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
    entries = read_entries(str(path), place=str(path), loader=TextLoader)
    if not entries:
        raise UserError(f"{path} must hold 'name: value' lines, but is empty.")
    counts = Counter(entry.name for entry in entries)
    if doubles := [name for name, count in counts.items() if count > 1]:
        raise UserError(f"{path} sets {doubles[0]} twice. Remove one of the lines.")
    for entry in entries:
        if problem := _bad_value(entry.value):
            raise UserError(
                f"{path} line {entry.line} must hold 'name: value' or 'name: [value, value]', but "
                f"{entry.name} has {problem}."
            )
    return {entry.name: entry.value for entry in entries}


def _check_more(options: Mapping[str, object], more: Sequence[str]) -> None:
    """Raise UserError if options after the sweep's file would undo what makes its runs differ.

    Args:
        options: Content of the sweep's file.
        more: The words after the file and NUMBER, which every run gets.
    """
    problem = next((p for word in more if (p := _bad_word(word))), None)
    names = [name for name, _ in split_argv(more, [])]
    if problem is not None:
        raise UserError(f"The options after the sweep's file hold {problem}.")
    if "output_dir" in names:
        raise UserError(
            "--output_dir after the sweep's file would put all runs into one folder. Set "
            "output_dir in the file: each run gets a folder of its own in it."
        )
    if varied := [name for name in names if isinstance(options.get(name), list)]:
        raise UserError(
            f"--{varied[0]} is varied by the sweep, but given for all runs too. Change its values "
            "in the file."
        )
    if printing := [name for name in [*options, *names] if name in PRINTING]:
        raise UserError(
            f"--{printing[0]} cannot be given in or after a sweep's file: it trains nothing. Leave "
            "it out."
        )


def _bad_value(value: object, depth: int = 0) -> str | None:
    """Return what is wrong with a value, as the end of a message; None if it is right.

    A value is text, a list of texts, or a list of these for an option that takes a list.
    """
    if isinstance(value, list):
        if depth == 2:
            return "a list in a list in a list"
        return next((p for part in value if (p := _bad_value(part, depth + 1))), None)
    if not isinstance(value, str):
        return "a map"
    return "a value that begins with --" if value.startswith("--") else _bad_word(value)


def _bad_word(word: str) -> str | None:
    # slurm/train_array.sbatch reads one word a line
    return "a value with a line break" if "\n" in word or "\r" in word else None


def runs_of(grid: dict[str, str | list[str]]) -> dict[str, list[str]]:
    """Expand a sweep into one run for every combination of the values in lists.

    The last list changes fastest: ``{rank: [8, 16], seed: [0, 1]}`` gives the runs rank=8,seed=0;
    rank=8,seed=1; rank=16,seed=0; rank=16,seed=1.

    Args:
        grid: {option: value, or list of values}.

    Returns:
        {name of the run's folder: its options as words of a command line}.

    Raises:
        UserError: Two runs would have the same folder, output_dir is no folder, or there are more
            than ``MOST_RUNS`` runs.
    """
    lists = {name: value for name, value in grid.items() if isinstance(value, list)}
    fixed = {name: value for name, value in grid.items() if isinstance(value, str)}
    parent = fixed.pop("output_dir", "runs/grid")
    if "output_dir" in lists or not parent.strip():
        raise UserError(
            "output_dir of a sweep must be one folder, in which each run gets a folder of its own. "
            f"It is {grid['output_dir']!r}. Name one folder."
        )
    if (count := prod(map(len, lists.values()))) > MOST_RUNS:
        raise UserError(
            f"The sweep has {count} runs, but at most {MOST_RUNS} are made from one file. Shorten "
            "its lists, or split them over several files."
        )
    runs: dict[str, list[str]] = {}
    for values in product(*lists.values()):
        chosen = dict(zip(lists, map(_text, values), strict=True))
        name = _folder(chosen)
        if name in runs:
            raise UserError(
                f"Two runs of the sweep would share the folder {parent}/{name}. Remove one of the "
                "equal values, or one of those that differ only in signs that a folder's name "
                "cannot have."
            )
        options = fixed | chosen | {"output_dir": f"{parent}/{name}"}
        runs[name] = [word for key, value in options.items() for word in (f"--{key}", value)]
    return runs


def _text(value: str | list[str]) -> str:
    """Return one value of a list as one word of the command line.

    A value that is itself a list, for an option that takes several names, is joined by commas.
    """
    return (",".join(value) or "[]") if isinstance(value, list) else value


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
            f"{path} describes no run, because one of its lists is empty. Give each list a value. "
            "An option that takes a list gets an empty one as [[]]."
        )
    names: dict[str, str] = {}
    for name, flags in runs.items():
        try:
            config = load_config(flags, says=False)  # the run itself says it
        except ConfigError as error:
            raise UserError(f"{path}, run {name}: {error}") from error
        options = str(config.as_flat_dict() | {"output_dir": ""})
        if names.setdefault(options, name) != name:
            raise UserError(
                f"{path}: the runs {names[options]} and {name} have the same options, written in "
                "two ways. Remove one of the values."
            )


def _number(text: str, count: int) -> int:
    if not (text.isascii() and text.isdecimal()) or len(text) > 9 or int(text) >= count:
        raise UserError(
            f"NUMBER selects a run of the sweep and must be from 0 to {count - 1}, "
            f"got {text[:40]}. Submit the sweep with sbatch --array=0-{count - 1}."
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
    words = shlex.join([grid.path, *grid.more])
    if not Path(ARRAY).exists():
        print(f"{ARRAY} is not here. Copy it with: sparse-lora-examples FOLDER")
    print(f"all of them: sbatch --array=0-{last} {ARRAY} {words}")
