"""Command line and YAML file -> ``Config``. All problems are found before anything is loaded.

Precedence: defaults < YAML file of --config < command line. jsonargparse parses each value by the
type of its field. The options are gone through one by one here, because a parser stops at its
first error.
"""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from importlib.util import find_spec
from typing import Any, NoReturn

import yaml

from sparse_lora_dist import methods
from sparse_lora_dist.config.arguments import read_flags, read_yaml, split_argv, typed_values
from sparse_lora_dist.config.checks import raise_if
from sparse_lora_dist.config.config import SECTIONS, Config
from sparse_lora_dist.config.deepspeed_file import check_engine_file, conflicts
from sparse_lora_dist.config.help_pages import help_page
from sparse_lora_dist.config.paths import missing_locations, missing_source
from sparse_lora_dist.config.schema import TRAIN, Option, Program, build_parser, known_options
from sparse_lora_dist.config.sections import TRACKERS
from sparse_lora_dist.config.spelling import did_you_mean
from sparse_lora_dist.distributed.launch import this_launch
from sparse_lora_dist.errors import ConfigError


def load_config(argv: Sequence[str]) -> Config:
    """Read the options of a training run.

    ``--help``, ``--help_all`` and ``--print_config`` print on rank 0 and exit with status 0.

    Args:
        argv: the words after the program's name.

    Raises:
        ConfigError: with all problems at once.
    """
    return read_options(argv, TRAIN)[0]


def read_options(argv: Sequence[str], program: Program) -> tuple[Config, Any]:
    """Read the options of a program that takes those of a training run.

    Args:
        argv: the words after the program's name.
        program: the program, with its own options, defaults and checks.

    Returns:
        The options of the run, and an instance of ``program.own`` (None if it has no own options).

    Raises:
        ConfigError: with all problems at once.
    """
    problems: list[str] = []
    options, parser = known_options(program), build_parser(program)
    flags = split_argv(argv, problems)
    names = [name for name, _ in flags]
    if (page := help_page(flags, program)) is not None:
        print_and_exit(page)
    given = [*read_yaml(flags, options, problems), *read_flags(flags, options, problems)]
    values = typed_values(given, options, parser, problems)
    config = build(values, options, problems, trains=program.trains)
    flat = {name: option.default for name, option in options.items()} | values
    own = None if program.own is None else make(program.own, flat, problems)
    problems += program.check(flat)
    raise_if(problems)
    assert config is not None, "raise_if has raised if a part is missing"
    if "print_config" in names:
        print_and_exit(yaml.safe_dump(config.as_flat_dict(), sort_keys=False))
    return config, own


def print_and_exit(text: str) -> NoReturn:
    """Print ``text`` on rank 0 and exit with status 0."""
    if this_launch().rank == 0:
        print(text.rstrip())
    raise SystemExit(0)


def build(
    values: Mapping[str, Any],
    options: Mapping[str, Option],
    problems: list[str],
    *,
    trains: bool = True,
) -> Config | None:
    """Build a Config from ``values`` and the defaults, and append all problems to ``problems``.

    Args:
        values: {option: value} that the user gave.
        options: all options that there are.
        problems: list that problems are appended to.
        trains: whether data, output and trackers must be usable too, not only the model.

    Returns:
        The Config; None if a section of it is invalid.
    """
    flat: dict[str, Any] = {name: option.default for name, option in options.items()} | dict(values)
    parts = parts_of(flat, problems)
    problems += foreign_options(values, flat["method"], options)
    config = None if None in parts.values() else whole(parts, problems)

    problems += missing_locations(flat) if trains else missing_source("model", flat["model"])
    for name in TRACKERS if trains else ():
        if name in flat["trackers"] and find_spec(name) is None:
            problems.append(f"trackers has {name}, which is not installed: pip install {name}")
    engine_problems = check_engine_file(flat["ds_config"])
    if config is not None and not engine_problems:
        engine_problems = conflicts(flat["ds_config"], config, trains=trains)
    problems += engine_problems
    return config


def saved_config(saved: Mapping[str, Any]) -> Config:
    """Rebuild a Config from what ``as_flat_dict`` returned, e.g. from a run's run.yaml.

    Args:
        saved: {option: value}. Files and folders that it names need not exist here.

    Raises:
        ConfigError: an option or a value is unknown to this version.
    """
    options = known_options()
    problems = [f"{name} is not an option of this version" for name in saved if name not in options]
    tuples = {name: tuple(v) if isinstance(v, list) else v for name, v in saved.items()}
    flat: dict[str, Any] = {n: option.default for n, option in options.items()} | tuples
    parts = parts_of(flat, problems)
    raise_if(problems)
    return Config(**parts)


def parts_of(flat: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    """Return {attribute of Config: section}; an invalid section is None, its problems appended."""
    parts = {name: make(section, flat, problems) for name, section in SECTIONS.items()}
    name = flat["method"]
    if name in methods.METHODS:
        parts["method_options"] = make(methods.METHODS[name].options, flat, problems)
    else:
        known, hint = ", ".join(methods.METHODS), did_you_mean(name, methods.METHODS)
        problems.append(f"method must be one of {known}, got {name!r}{hint}")
    return parts


def whole(parts: dict[str, Any], problems: list[str]) -> Config | None:
    """Return the Config, or None with the problems between its sections appended."""
    try:
        return Config(**parts)
    except ConfigError as error:
        problems += error.problems
    return None


def make(part: type[Any], flat: Mapping[str, Any], problems: list[str]) -> Any:
    """Return an instance of the dataclass ``part``, or None with its problems appended."""
    try:
        return part(**{f.name: flat[f.name] for f in fields(part)})
    except ConfigError as error:
        problems += error.problems
    except ValueError as error:  # from a method's check of its options
        problems.append(str(error))
    return None


def foreign_options(
    values: Mapping[str, Any], method: str, options: Mapping[str, Option]
) -> list[str]:
    """Return a problem for each given option that belongs to another method."""
    if method not in methods.METHODS:
        return []
    return [
        f"--{name} belongs to method {options[name].method}, but --method is {method}"
        for name in values
        if options[name].method not in (None, method)
    ]
