"""What the command lines do, for programs of one's own: options by name."""

from pathlib import Path

from sparse_lora_dist.config.config import Config
from sparse_lora_dist.config.load import load_config
from sparse_lora_dist.export.export_options import load_request
from sparse_lora_dist.runtime.entry_point import quiet_others


def settings(**options: object) -> Config:
    """A run, described by the options of launcher/train.py, what other libraries print silenced.

    Raises:
        ConfigError: with every problem there is.
    """
    config = load_config(_words(options))
    if not config.run.debug:
        quiet_others()
    return config


def export_run(source: str | Path, output: str | Path, **options: object) -> None:
    """Write what was trained, by the options of launcher/export.py.

    Raises:
        UserError: there is nothing to export, or something in the way.
    """
    from sparse_lora_dist.export.export_command import export

    export(load_request([str(source), "--output", str(output), *_words(options)]))


def _words(options: dict[str, object]) -> list[str]:
    """Of a command line, as a person would type them."""
    return [word for name, value in options.items() for word in (f"--{name}", _text(value))]


def _text(value: object) -> str:
    if isinstance(value, list | tuple):
        return ",".join(map(str, value)) or "[]"
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return str(value)
