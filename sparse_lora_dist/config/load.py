"""Command line and YAML file -> Config. Every problem is found before anything is loaded.

    defaults < YAML file of --config < command line

jsonargparse parses each value by its field's type and writes the help. Going through the options
one by one is ours, because a parser stops at its first error.
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
from sparse_lora_dist.config.spelling import did_you_mean
from sparse_lora_dist.distributed.launch import this_launch
from sparse_lora_dist.errors import ConfigError


def load_config(argv: Sequence[str]) -> Config:
    """The run that ``argv`` (without the program's name) and its YAML file describe.

    ``--help`` and ``--print_config`` print on rank 0 and end every rank with status 0.

    Raises:
        ConfigError: with every problem there is.
    """
    return read_options(argv, TRAIN)[0]


def read_options(argv: Sequence[str], program: Program) -> tuple[Config, Any]:
    """The run, and an instance of what the program has of its own, or None.

    Raises:
        ConfigError: with every problem there is.
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
    assert config is not None, "neither a config nor a problem"
    if "print_config" in names:
        print_and_exit(yaml.safe_dump(config.as_flat_dict(), sort_keys=False))
    return config, own


def print_and_exit(text: str) -> NoReturn:
    """Ends the program with status 0; rank 0 prints ``text`` first."""
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
    """The config of ``values`` over the defaults; None when a part of it cannot be made. Places
    that only a run reads or writes need not exist where nobody ``trains``."""
    flat: dict[str, Any] = {name: option.default for name, option in options.items()} | dict(values)
    parts = parts_of(flat, problems)
    problems += foreign_options(values, flat["method"], options)
    config = None if None in parts.values() else whole(parts, problems)

    problems += missing_locations(flat) if trains else missing_source("model", flat["model"])
    if trains and "wandb" in flat["trackers"] and find_spec("wandb") is None:
        problems.append("trackers has wandb, which is not installed: pip install wandb")
    engine_problems = check_engine_file(flat["ds_config"])
    if config is not None and not engine_problems:
        engine_problems = conflicts(flat["ds_config"], config, trains=trains)
    problems += engine_problems
    return config


def saved_config(saved: Mapping[str, Any]) -> Config:
    """The config that ``as_flat_dict`` was saved of; places that it names need not exist here.

    Raises:
        ConfigError: this version does not know what it says.
    """
    options = known_options()
    problems = [f"{name} is no option of this version" for name in saved if name not in options]
    tuples = {name: tuple(v) if isinstance(v, list) else v for name, v in saved.items()}
    flat: dict[str, Any] = {n: option.default for n, option in options.items()} | tuples
    parts = parts_of(flat, problems)
    raise_if(problems)
    return Config(**parts)


def parts_of(flat: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    """The parts of a Config, each None where it has problems, which are added."""
    parts = {name: make(section, flat, problems) for name, section in SECTIONS.items()}
    name = flat["method"]
    if name in methods.METHODS:
        parts["method_options"] = make(methods.METHODS[name].options, flat, problems)
    else:
        known, hint = ", ".join(methods.METHODS), did_you_mean(name, methods.METHODS)
        problems.append(f"method must be one of {known}, got {name!r}{hint}")
    return parts


def whole(parts: dict[str, Any], problems: list[str]) -> Config | None:
    """The parts together, or None with the problems that lie between them added."""
    try:
        return Config(**parts)
    except ConfigError as error:
        problems += error.problems
    return None


def make(part: type[Any], flat: Mapping[str, Any], problems: list[str]) -> Any:
    """An instance of the dataclass ``part``, or None with its problems added."""
    try:
        return part(**{f.name: flat[f.name] for f in fields(part)})
    except ConfigError as error:
        problems += error.problems
    except ValueError as error:  # a method's own check of its options
        problems.append(str(error))
    return None


def foreign_options(
    values: Mapping[str, Any], method: str, options: Mapping[str, Option]
) -> list[str]:
    """A line for each option the user gave that belongs to another method."""
    if method not in methods.METHODS:
        return []
    return [
        f"--{name} belongs to method {options[name].method}, but --method is {method}"
        for name in values
        if options[name].method not in (None, method)
    ]
