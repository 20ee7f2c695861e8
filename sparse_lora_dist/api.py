"""Python API that takes the options of the command lines as keyword arguments."""

from pathlib import Path

from sparse_lora_dist.config.config import Config
from sparse_lora_dist.config.load import load_config
from sparse_lora_dist.export.export_options import load_request
from sparse_lora_dist.runtime.entry_point import quiet_others


def settings(**options: object) -> Config:
    """Check the options of a run, and return its config for ``run`` and ``training``.

    Unless ``debug`` is set, warnings and log messages of other libraries are silenced in this
    process.

    Args:
        options: options of launcher/train.py by name, e.g. ``max_steps=100``.

    Returns:
        The config, with the default value of each option that is not given.

    Raises:
        ConfigError: options are wrong or contradict each other; the message lists every problem.
    """
    config = load_config(_words(options))
    if not config.run.debug:
        quiet_others()
    return config


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

    export(load_request([str(source), "--output", str(output), *_words(options)]))


def _words(options: dict[str, object]) -> list[str]:
    """Return the options as the arguments of a command line: {"max_steps": 100} gives
    ["--max_steps", "100"]."""
    return [word for name, value in options.items() for word in (f"--{name}", _text(value))]


def _text(value: object) -> str:
    if isinstance(value, list | tuple):
        return ",".join(map(str, value)) or "[]"
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return str(value)
