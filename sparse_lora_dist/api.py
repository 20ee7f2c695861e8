"""Python API that takes the options of the command lines as keyword arguments."""

import os
from collections.abc import Mapping
from dataclasses import replace
from numbers import Real
from pathlib import Path

from sparse_lora_dist.config.arguments import ACTIONS, short
from sparse_lora_dist.config.checks import raise_if
from sparse_lora_dist.config.config import Config
from sparse_lora_dist.config.load import load_config
from sparse_lora_dist.errors import UserError
from sparse_lora_dist.export.export_options import load_request
from sparse_lora_dist.runtime.entry_point import quiet_others


def settings(**options: object) -> Config:
    """Check the options of a run, and return its config for ``run`` and ``training``.

    Unless ``debug`` is set, warnings and log messages of other libraries are silenced in this
    process.

    Args:
        options: options of launcher/train.py by name, e.g. ``max_steps=100``.

    Returns:
        The config, with the default value of each option that is not given. The folders that a run
        writes, ``output_dir`` and ``base_cache``, have absolute paths, so that they stay the same
        if the program changes its working directory.

    Raises:
        ConfigError: options are wrong or contradict each other; the message lists every problem.
    """
    config = load_config(_words(options))
    if not config.run.debug:
        quiet_others()
    run, model = config.run, config.model
    run = replace(run, output_dir=str(Path(run.output_dir).absolute()))
    if model.base_cache is not None:
        model = replace(model, base_cache=str(Path(model.base_cache).absolute()))
    return replace(config, run=run, model=model)


def export_run(source: str | Path, output: str | Path, **options: object) -> None:
    """Write the adapter of a run, or the base merged with it, to a folder. Call it in one process.

    Args:
        source: run folder, or folder of a checkpoint.
        output: folder to write.
        options: further options of launcher/export.py by name, e.g. ``format="merged"``.

    Raises:
        UserError: there is nothing to export, an option is wrong, or ``output`` is not empty.
    """
    # Late: it imports transformers and DeepSpeed, which ``settings`` does not need.
    from sparse_lora_dist.export.export_command import export

    for name, value in (("source", source), ("output", output)):
        if not _is_path(value):
            raise UserError(f"{name} must be a str or a Path, got {_with_type(value)}.")
    words = _words({**options, "output": output})
    export(load_request([*words, "--", os.fspath(source)]))


def _words(options: Mapping[str, object]) -> list[str]:
    """Return the options as the arguments of a command line: {"max_steps": 100} gives
    ["--max_steps=100"].

    Raises:
        ConfigError: a value has a type that no option takes, or an option only prints something.
    """
    problems = [
        f"{name} is for the command line, where it prints and ends the program. Leave it out"
        for name in options
        if name in ACTIONS and name != "config"
    ]
    problems += [
        f"{name} must be a str, Path, number, bool, None or a list of these, got "
        f"{_with_type(value)}"
        for name, value in options.items()
        if not all(map(_has_type, value if isinstance(value, list | tuple) else [value]))
    ]
    raise_if(problems)
    return [f"--{name}={_text(value)}" for name, value in options.items()]


def _is_path(value: object) -> bool:
    return isinstance(value, str | os.PathLike) and isinstance(os.fspath(value), str)


def _has_type(value: object) -> bool:
    return value is None or isinstance(value, Real) or _is_path(value)


def _with_type(value: object) -> str:
    return f"{short(value)} of type {type(value).__name__}"


def _text(value: object) -> str:
    if isinstance(value, list | tuple):
        return ",".join(map(_text, value)) or "[]"
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return os.fspath(value) if isinstance(value, os.PathLike) else str(value)
