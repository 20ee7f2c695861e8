"""The exporter's command line."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import Literal

from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings

from sparse_lora_dist.bounds import raise_if
from sparse_lora_dist.config import RunConfig
from sparse_lora_dist.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """What to write, and where"""

    output: str
    """Folder to write; it must not be there, or be empty."""
    format: Literal["peft", "merged", "sparse_delta"] = "peft"
    """peft: a LoRA adapter of what lives; merged: a whole model; sparse_delta: changed weights."""
    uniform_rank: bool = False
    """peft: one rank for all modules and the scale in B, for servers that know no other (vLLM)."""
    dtype: Literal["bf16", "fp32"] = "bf16"
    """merged: what weights are rounded to, once."""
    rounding: Literal["nearest", "stochastic"] = "nearest"
    """merged, in bf16: nearest loses deltas far below a weight; stochastic keeps their mean."""
    onto: Literal["dequantised", "original"] = "dequantised"
    """merged: onto what the adapter was trained over, or onto the weights that were quantised."""
    base: str | None = None
    """Folder or hub id of the base model, where it is not where the run had it."""
    overwrite: bool = False
    """Replace what is in the folder."""

    def __post_init__(self) -> None:
        problems = []
        if self.uniform_rank and self.format != "peft":
            problems.append(f"uniform_rank belongs to format peft, got {self.format}")
        if self.format != "merged":
            changed = {"dtype": "bf16", "rounding": "nearest", "onto": "dequantised", "base": None}
            problems += [
                f"{name} belongs to format merged, got {self.format}"
                for name, usual in changed.items()
                if getattr(self, name) != usual
            ]
        if self.rounding == "stochastic" and self.dtype == "fp32":
            problems.append("rounding stochastic is for dtype bf16: fp32 keeps what was summed")
        raise_if(problems)


@dataclass(frozen=True, kw_only=True)
class ExportRequest:
    """A run, and what is to become of it."""

    source: str
    export: ExportConfig
    run: RunConfig = field(default_factory=RunConfig)
    """Where ``run_program`` looks for --debug."""


def load_request(argv: Sequence[str]) -> ExportRequest:
    """What ``argv`` asks; ``--help`` prints and leaves.

    Raises:
        ConfigError: it asks for what there is not.
    """
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(
        prog="launcher/export.py",
        description="The adapter of a run as files that other tools open.",
        exit_on_error=False,
    )
    parser.add_argument("source", help="a run's folder, or one of its checkpoints/step_...")
    parser.add_class_arguments(ExportConfig, None)
    try:
        parsed = parser.parse_args(list(_switched_on(argv)))
        export = ExportConfig(**{f.name: parsed[f.name] for f in fields(ExportConfig)})
    except ArgumentError as error:
        raise ConfigError([" ".join(str(error).split())]) from error
    return ExportRequest(source=parsed.source, export=export)


def _switched_on(argv: Sequence[str]) -> Iterator[str]:
    """A switch without a word after it means true, as everywhere here."""
    switches = {f"--{f.name}" for f in fields(ExportConfig) if isinstance(f.default, bool)}
    for word, after in zip(argv, [*argv[1:], ""], strict=True):
        yield f"{word}=true" if word in switches and after not in ("true", "false") else word
