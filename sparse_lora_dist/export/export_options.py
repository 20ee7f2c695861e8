"""The exporter's command line."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Literal

from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings

from sparse_lora_dist.config.checks import raise_if
from sparse_lora_dist.config.sections import RunConfig
from sparse_lora_dist.errors import ConfigError

OF_MERGED = ("dtype", "rounding", "onto")


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """What to write, and where"""

    output: str
    """Folder to write; it must not be there, or be empty."""
    format: Literal["peft", "merged", "sparse_delta"] = "peft"
    """peft: a LoRA adapter of what lives, or PEFT's own type of the method where its update is no
    LoRA; merged: a whole model; sparse_delta: changed weights."""
    plus: str | None = None
    """Other runs over the same base, or checkpoints of theirs, whose updates are added: folders,
    separated by commas."""
    uniform_rank: bool = False
    """peft: one rank for all modules and the scale in B, for servers that know no other (vLLM)."""
    own_type: bool = False
    """peft: PEFT's own type of the method where its update is a LoRA too (neat: peanut)."""
    dtype: Literal["bf16", "fp32"] = "bf16"
    """merged: what weights are rounded to, once."""
    rounding: Literal["nearest", "stochastic"] = "nearest"
    """merged, in bf16: nearest loses deltas far below a weight; stochastic keeps their mean."""
    onto: Literal["dequantised", "original"] = "dequantised"
    """merged: onto what the adapter was trained over, or onto the weights that were quantised."""
    base: str | None = None
    """Folder or hub id of the base model, where it is not where the run had it."""
    trust_remote_code: bool = False
    """Of a run that was told so, where the base is read: run Python code that comes with it."""
    overwrite: bool = False
    """Replace the folder, where it is an earlier export."""
    debug: bool = False
    """Show tracebacks, and what other libraries print."""

    def __post_init__(self) -> None:
        problems = []
        if self.uniform_rank and self.format != "peft":
            problems.append(f"uniform_rank belongs to format peft, got {self.format}")
        if self.plus is not None and not all(part.strip() for part in self.plus.split(",")):
            problems.append(f"plus must be folders separated by commas, got {self.plus!r}")
        if self.own_type and (self.format != "peft" or self.uniform_rank):
            problems.append("own_type belongs to format peft, and not with uniform_rank")
        if self.format != "merged":
            problems += [
                f"{f.name} belongs to format merged, got {self.format}"
                for f in fields(self)
                if f.name in OF_MERGED and getattr(self, f.name) != f.default
            ]
        if self.rounding == "stochastic" and self.dtype == "fp32":
            problems.append("rounding stochastic is for dtype bf16: fp32 keeps what was summed")
        raise_if(problems)


@dataclass(frozen=True, kw_only=True)
class ExportRequest:
    """A run, and what is to become of it."""

    source: str
    export: ExportConfig

    @property
    def run(self) -> RunConfig:
        """Where ``run_program`` looks for --debug."""
        return RunConfig(debug=self.export.debug)


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
        allow_abbrev=False,
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
    for word, after in zip(argv, [*argv, ""][1:], strict=True):
        lone = after.lower() not in ("true", "false", "yes", "no")
        yield f"{word}=true" if word in switches and lone else word
