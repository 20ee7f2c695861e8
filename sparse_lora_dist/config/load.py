"""Read the options of a run from the command line and a YAML file into a ``Config``.

All problems are reported together, before a model or data are loaded. A value on the command line
replaces that of the YAML file of --config, which replaces the default. jsonargparse parses each
value by the type of its field. It is called for one option at a time, because a parser stops at its
first error.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields
from importlib.util import find_spec
from typing import Any, NoReturn

from sparse_lora_dist import methods
from sparse_lora_dist.config.arguments import (
    given_again,
    read_flags,
    read_yaml,
    split_argv,
    typed_values,
)
from sparse_lora_dist.config.checks import raise_if
from sparse_lora_dist.config.config import SECTIONS, Config
from sparse_lora_dist.config.deepspeed_file import check_engine_file, conflicts
from sparse_lora_dist.config.help_pages import help_page
from sparse_lora_dist.config.paths import (
    missing_locations,
    missing_source,
    moved_run,
    where_it_goes_on,
)
from sparse_lora_dist.config.schema import TRAIN, Option, Program, build_parser, known_options
from sparse_lora_dist.config.sections import TRACKERS
from sparse_lora_dist.config.spelling import did_you_mean
from sparse_lora_dist.config.yaml_file import yaml_of
from sparse_lora_dist.distributed.launch import this_launch
from sparse_lora_dist.errors import ConfigError
from sparse_lora_dist.system.program_names import as_started_here


def load_config(argv: Sequence[str], *, says: bool = True) -> Config:
    """Return the checked options of a training run.

    ``--help``, ``--help_all`` and ``--print_config`` print on rank 0 and exit with status 0 on all
    ranks.

    Args:
        argv: The words after the program's name.
        says: True: notes about the options are printed.

    Raises:
        ConfigError: Some options are wrong; it lists all problems.
    """
    return read_options(argv, TRAIN, says=says)[0]


def read_options(argv: Sequence[str], program: Program, *, says: bool = True) -> tuple[Config, Any]:
    """Return the options of a program that takes those of a training run and its own.

    Args:
        argv: The words after the program's name.
        program: The program, with its own options, defaults and checks.
        says: True: notes about the options are printed; on standard error by programs that do not
            train, as what launcher/plan.py prints may be read by another program.

    Returns:
        The options of the run, and an instance of ``program.own`` (None if it has no own options).

    Raises:
        ConfigError: Some options are wrong; it lists all problems.
    """
    problems: list[str] = []
    options, parser = known_options(program), build_parser(program)
    flags = split_argv(argv, problems)
    names = [name for name, _ in flags]
    if (page := help_page(flags, program)) is not None:
        print_and_exit(as_started_here(page))
    problems += [
        f"--{name} has no effect in {program.name}. {program.ignored[name] or 'Leave it out'}"
        for name in dict.fromkeys(names)
        if name in program.ignored
    ]
    given = [*read_yaml(flags, options, problems), *read_flags(flags, options, problems)]
    values = typed_values(given, options, parser, problems)
    notes = given_again(flags)
    if (folder := moved_run(flags, values)) is not None:
        notes.append(where_it_goes_on(str(values["output_dir"]), folder))
        values["output_dir"] = folder
    config = build(values, options, problems, trains=program.trains)
    flat = {name: option.default for name, option in options.items()} | values
    own = None if program.own is None else make(program.own, flat, problems)
    problems += program.check(flat)
    raise_if(problems)
    assert config is not None, "raise_if has raised if a part is missing"
    if "print_config" in names:
        print_and_exit(yaml_of(config.as_flat_dict()))
    for note in notes if says and this_launch().rank == 0 else ():
        print(f"note      {note}", file=None if program.trains else sys.stderr)
    return config, own


def print_and_exit(text: str) -> NoReturn:
    """Print ``text`` on rank 0, and exit with status 0 on all ranks."""
    if this_launch().rank == 0:
        print(text.rstrip(), flush=True)
    raise SystemExit(0)


def build(
    values: Mapping[str, Any],
    options: Mapping[str, Option],
    problems: list[str],
    *,
    trains: bool = True,
) -> Config | None:
    """Check the given values and combine them with the defaults into a Config.

    Args:
        values: {option: parsed value} that the user gave.
        options: All options of the program, by name.
        problems: List of messages. One is appended for each problem.
        trains: True: data, output folder and trackers are checked too, not only the model.

    Returns:
        The Config, or None if a section is invalid or sections contradict each other.
    """
    flat: dict[str, Any] = {name: option.default for name, option in options.items()} | dict(values)
    parts = parts_of(flat, problems)
    problems += foreign_options(values, flat["method"], options)
    config = None if None in parts.values() else whole(parts, problems)

    problems += missing_locations(flat) if trains else missing_source("model", flat["model"])
    for name in TRACKERS if trains else ():
        if name in flat["trackers"] and find_spec(name) is None:
            problems.append(
                f"--trackers names {name}, which is not installed. Run: pip install {name}"
            )
    engine_problems = check_engine_file(flat["ds_config"])
    if config is not None and not engine_problems:
        engine_problems = conflicts(flat["ds_config"], config, trains=trains)
    problems += engine_problems
    return config


def saved_config(saved: Mapping[str, Any]) -> Config:
    """Rebuild a Config from a saved ``Config.as_flat_dict()``, e.g. from a run's run.yaml.

    Args:
        saved: {option: value}. Files and folders that it names need not exist on this machine. An
            option that is missing gets its default.

    Raises:
        ConfigError: This version does not know an option, or does not allow a value.
    """
    options = known_options()
    problems = [
        f"{name} is saved with the run, but is not an option of this version. Use the version "
        "that wrote it"
        for name in saved
        if name not in options
    ]
    tuples = {name: tuple(v) if isinstance(v, list) else v for name, v in saved.items()}
    flat: dict[str, Any] = {n: option.default for n, option in options.items()} | tuples
    parts = parts_of(flat, problems)
    raise_if(problems)
    return Config(**parts)


def parts_of(flat: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    """Build the sections of a Config, and the options of its method.

    Args:
        flat: {option: value} of all options.
        problems: List of messages. One is appended for each problem.

    Returns:
        {attribute of Config: section}, with None for an invalid section. Without a known method
            there is no entry "method_options".
    """
    parts = {name: make(section, flat, problems) for name, section in SECTIONS.items()}
    name = flat["method"]
    if name in methods.METHODS:
        parts["method_options"] = make(methods.METHODS[name].options, flat, problems)
    else:
        known, hint = ", ".join(methods.METHODS), did_you_mean(name, methods.METHODS)
        problems.append(f"--method must be one of {known}, got {name!r}{hint}")
    return parts


def whole(parts: dict[str, Any], problems: list[str]) -> Config | None:
    """Build the Config from its sections.

    Args:
        parts: {attribute of Config: section}.
        problems: List of messages. One is appended for each contradiction between sections.

    Returns:
        The Config, or None if the sections contradict each other.
    """
    try:
        return Config(**parts)
    except ConfigError as error:
        problems += error.problems
    return None


def make(part: type[Any], flat: Mapping[str, Any], problems: list[str]) -> Any:
    """Build one section: an instance of a dataclass of options, which checks its values.

    Args:
        part: The dataclass.
        flat: {option: value} of at least the options that are its fields.
        problems: List of messages. One is appended for each problem.

    Returns:
        The instance, or None if a value is invalid.
    """
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
    """Return a message for each given option that belongs to another method than the run's.

    Args:
        values: {option: value} that the user gave.
        method: Value of --method.
        options: All options of the program, by name.
    """
    if method not in methods.METHODS:
        return []
    return [
        f"--{name} belongs to --method {options[name].method}, but --method is {method}. Leave it "
        "out"
        for name in values
        if options[name].method not in (None, method)
    ]
