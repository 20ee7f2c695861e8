"""Options of launcher/export.py."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Literal, get_type_hints

from jsonargparse import ArgumentError, ArgumentParser

from sparse_lora_dist.config.checks import raise_if
from sparse_lora_dist.config.load import make
from sparse_lora_dist.config.paths import bad_path, expanded
from sparse_lora_dist.config.schema import describe, new_parser
from sparse_lora_dist.config.sections import RunConfig
from sparse_lora_dist.errors import ConfigError
from sparse_lora_dist.system.program_names import as_started_here

OF_MERGED = ("dtype", "rounding", "onto")
"""Names of the options that only --format merged accepts."""


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Export"""

    output: str
    """Folder to write. Must be missing or empty, unless --overwrite is given."""
    format: Literal["peft", "merged", "sparse_delta"] = "peft"
    """Format to write: peft (an adapter: a LoRA without components that add nothing, or the
    method's own PEFT type if its update is not a LoRA), merged (a whole model) or sparse_delta (the
    nonzero updates as indices and values)."""
    plus: str | None = None
    """Folders of other runs or checkpoints over the same base, separated by commas. Their updates
    are added to this run's. null: this run only."""
    uniform_rank: bool = False
    """Format peft: pad all modules to one rank and multiply the scale into B, for servers that need
    this (vLLM). Modules trained in full go to modules_to_save.safetensors."""
    own_type: bool = False
    """Format peft: write the method's own PEFT adapter type (neat: PEANUT) instead of a LoRA with
    the same update."""
    dtype: Literal["bf16", "fp32"] = "bf16"
    """Format merged: dtype of the written weights, which are rounded once."""
    rounding: Literal["nearest", "stochastic"] = "nearest"
    """Format merged with --dtype bf16: rounding of the changed weights. nearest drops updates much
    smaller than their weight; stochastic keeps them on average."""
    onto: Literal["dequantised", "original"] = "dequantised"
    """Format merged: weights that the update is added to, the dequantised ones that the adapter was
    trained with, or the original ones before quantisation."""
    base: str | None = None
    """Base model: folder or hub id. null: where the run found it."""
    trust_remote_code: bool = False
    """Run Python code that comes with the base model. Needed if the run needed it and the export
    reads the base."""
    overwrite: bool = False
    """Replace --output if it is an earlier export."""
    debug: bool = False
    """Show tracebacks and the output of other libraries."""

    def __post_init__(self) -> None:
        problems = []
        if self.uniform_rank and self.format != "peft":
            problems.append(
                f"--uniform_rank belongs to --format peft, got --format {self.format}. Leave it out"
            )
        if self.plus is not None and not all(part.strip() for part in self.plus.split(",")):
            problems.append(f"--plus must be folders separated by commas, got {self.plus!r}")
        if self.own_type and (self.format != "peft" or self.uniform_rank):
            problems.append(
                "--own_type needs --format peft without --uniform_rank. Leave --own_type out, or "
                "give those"
            )
        if self.rounding == "stochastic" and self.dtype == "fp32":
            problems.append(
                "--rounding stochastic is for --dtype bf16, got fp32, which is precise enough to "
                "keep small updates without it. Leave --rounding out"
            )
        raise_if(problems)


@dataclass(frozen=True, kw_only=True)
class ExportRequest:
    """What launcher/export.py was asked for: a run or checkpoint to export, and the options."""

    source: str
    """Run folder, or folder of a checkpoint."""
    export: ExportConfig

    @property
    def run(self) -> RunConfig:
        """Run options that ``run_program``, the main function of all programs, reads: --debug."""
        return RunConfig(debug=self.export.debug)


def load_request(argv: Sequence[str]) -> ExportRequest:
    """Parse the command line of launcher/export.py; ``--help`` prints the help page and exits.

    Args:
        argv: The command line's arguments, without the program's name.

    Returns:
        The run or checkpoint to export, and the checked options.

    Raises:
        ConfigError: An option or a value is wrong.
    """
    parser = build_parser()
    try:
        parsed = parser.parse_args(list(_switched_on(argv)))
    except ArgumentError as error:
        raise ConfigError([_in_our_words(error)]) from error
    given = {f.name: parsed[f.name] for f in fields(ExportConfig)} | {"source": parsed.source}
    problems = _of_merged(argv, given["format"])
    for name in ("source", "output", "plus", "base"):
        place = "the run folder" if name == "source" else f"--{name}"
        given[name] = _path(place, given[name], problems)
    export = make(ExportConfig, given, problems)
    raise_if(problems)
    return ExportRequest(source=given["source"], export=export)


def _of_merged(argv: Sequence[str], format: str) -> list[str]:
    """Return a message for each option on the command line that only --format merged accepts, also
    if its value is the default."""
    typed = {word.partition("=")[0] for word in argv}
    return [
        f"--{name} belongs to --format merged, got --format {format}. Leave it out"
        for name in OF_MERGED
        if format != "merged" and f"--{name}" in typed
    ]


def _in_our_words(error: ArgumentError) -> str:
    """Return the message of jsonargparse's parser; about a wrong value, without Python's types."""
    text = " ".join(str(error).split())
    hints = get_type_hints(ExportConfig)
    found = re.search(r"Parser key \"(\w+)\".*Got value: (.*)", text)
    if found is None or found[1] not in hints:
        return text
    return f"--{found[1]} must be {describe(hints[found[1]])}, got {found[2][:200]}"


def _path(place: str, text: str | None, problems: list[str]) -> str | None:
    """Return a path, or several that commas separate, with ~ expanded.

    Args:
        place: Option or argument that has the path, for messages.
        text: The path; None if the option is not given.
        problems: List of messages. One is appended for each part that cannot be a path.
    """
    if text is None:
        return None
    if not text.strip():
        problems.append(f"{place} is empty. (A shell variable that is not set gives that.)")
    parts = text.split(",") if place == "--plus" else [text]
    for part in parts:
        problems += bad_path(place, part.strip())
    return ",".join(expanded(part.strip()) for part in parts)


def build_parser() -> ArgumentParser:
    """Return the parser of launcher/export.py's command line."""
    parser = new_parser(
        prog=as_started_here("launcher/export.py"),
        description="Export the adapter of a run to files that other tools read.",
        allow_abbrev=False,
    )
    parser.add_argument("source", help="Run folder, or one of its checkpoints/step_... folders.")
    parser.add_class_arguments(ExportConfig, None)
    return parser


def _switched_on(argv: Sequence[str]) -> Iterator[str]:
    """Yield the command line's arguments, with "--debug" as "--debug=true" if no value follows.

    This holds for all boolean options. jsonargparse requires a value, but the other programs of
    this project accept these options without one.
    """
    switches = {f"--{f.name}" for f in fields(ExportConfig) if isinstance(f.default, bool)}
    for word, after in zip(argv, [*argv, ""][1:], strict=True):
        lone = after.lower() not in ("true", "false", "yes", "no")
        yield f"{word}=true" if word in switches and lone else word
