"""Options of launcher/eval.py: those of a training run, and the evaluation's own."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from sparse_lora_dist.config.checks import at_least, at_most, raise_if
from sparse_lora_dist.config.config import Config
from sparse_lora_dist.config.load import read_options
from sparse_lora_dist.config.paths import (
    eval_source,
    expanded,
    looks_local,
    missing_files,
    missing_source,
    real_path,
    with_commas,
)
from sparse_lora_dist.config.schema import Program
from sparse_lora_dist.config.sections import AdapterConfig, RunConfig, TrainConfig
from sparse_lora_dist.config.spelling import did_you_mean
from sparse_lora_dist.system.small_files import MOST_BYTES, parse_json
from sparse_lora_dist.system.whole_folders import is_mount_point

COMMON = """
    model precision quantization eval_data text_field prompt_field response_field chat_template
    train_on sequence_length ds_config debug
""".split()
"""Options of a training run that ``--help`` of launcher/eval.py shows."""
METRICS = ("loss", "choice", "choice_generated", "exact", "gsm8k")
"""Names that --metrics takes."""
BASE = "base"
"""Word in --adapter and --compare that means the base model without an adapter."""


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Evaluation of adapters on --eval_data"""

    adapter: str | None = None
    """PEFT LoRA adapter to evaluate: its folder, a run folder or a hub id. null: the base model
    alone."""
    compare: tuple[str, ...] = ()
    """Adapters to evaluate and compare with the first of them, in place of --adapter. The name base
    means the base model alone."""
    metrics: tuple[str, ...] = ("loss",)
    """Metrics to compute: loss (nats per token), choice (share of questions whose right choice is
    the most likely), choice_generated (share whose generated text names the right choice), exact
    (share whose generated text equals the answer), gsm8k (share whose generated text has the right
    final number)."""
    batch_size: int = 8
    """Number of texts or prompts per batch, from 1 to 65536; for the metric choice, each choice of
    a question is one text. Each batch is computed by one rank."""
    max_new_tokens: int = 256
    """Largest number of tokens per generated answer, from 1 to 1048576."""
    limit: int | None = None
    """Number of examples to use, from the first on, at least 1. null: all."""
    output: str | None = None
    """JSON file for the results. null: results are only printed."""
    answers: str | None = None
    """JSON Lines file for the results of each example: its loss, or whether the model is right, and
    the generated text. A text cut into several documents has a line for each. null: this file is
    not written."""
    overwrite: bool = False
    """Replace existing files at --output and --answers."""

    def __post_init__(self) -> None:
        problems = at_least(self, 1, "batch_size", "max_new_tokens", "limit")
        problems += at_most(self, 2**16, "batch_size") + at_most(self, 2**20, "max_new_tokens")
        problems += [
            f"--metrics must be any of {', '.join(METRICS)}, got {name!r}"
            f"{did_you_mean(name, METRICS)}"
            for name in self.metrics
            if name not in METRICS
        ]
        if not self.metrics:
            problems.append(f"--metrics is empty. Name at least one of {', '.join(METRICS)}")
        if self.compare and self.adapter is not None:
            problems.append(
                "--adapter and --compare are both given, but exclude each other. Name all adapters "
                "in --compare"
            )
        for name in self.names:
            if name is not None and looks_local(name) and not Path(expanded(name)).exists():
                flag = "compare" if self.compare else "adapter"
                problems.append(
                    f"--{flag} {name} does not exist, and is not a hub id. Check the path"
                )
        places = {real_path(f"--{flag}", path) for flag, path in self.files.items()}
        if len(places) < len(self.files):
            problems.append(
                f"--output and --answers both name {self.output}, so one would replace the other. "
                "Give two names"
            )
        for flag, path in self.files.items():
            problems += bad_output(flag, path, overwrite=self.overwrite)
        raise_if(problems)

    @property
    def files(self) -> dict[str, Path]:
        """{option: path of the file to write}, for --output and --answers if they are set."""
        given = {"output": self.output, "answers": self.answers}
        return {flag: Path(expanded(p)) for flag, p in given.items() if p is not None}

    @property
    def names(self) -> tuple[str | None, ...]:
        """Adapters to evaluate, as the user named them; an entry None is the base model alone."""
        named = with_commas(self.compare) or (self.adapter,)
        return tuple(None if name == BASE else name for name in named)


@dataclass(frozen=True, kw_only=True)
class EvalRequest:
    """What launcher/eval.py was asked for: all options, and the data to evaluate on."""

    config: Config
    """Options that evaluation shares with training."""
    own: EvalConfig
    """Options that only evaluation has."""
    source: str
    """Path or hub id of the evaluation data."""

    @property
    def run(self) -> RunConfig:
        """Run options that ``run_program``, the main function of all programs, reads: --debug."""
        return self.config.run


def bad_output(flag: str, path: Path, *, overwrite: bool) -> list[str]:
    """Return a message if results cannot be written to a file.

    Args:
        flag: Name of the option that names the file, without dashes.
        path: The file.
        overwrite: True if an existing file may be replaced.

    Returns:
        A list with the message, or an empty list.
    """
    if path.is_dir():
        return [f"--{flag} must be a file, got the folder {path}"]
    exists = os.path.lexists(path)
    if exists and not path.is_symlink() and is_mount_point(path):
        return [
            f"--{flag} {path} is a mount point, and a file that is mounted cannot be replaced. "
            "Mount the folder around it in its place, or give another name"
        ]
    if exists and not overwrite:
        return [f"--{flag} {path} exists already. Give --overwrite or another name"]
    if exists and not _is_written_here(flag, path):
        return [
            f"--{flag} {path} is no file that --{flag} has written, so --overwrite does not "
            "replace it. Give another name"
        ]
    return []


def _is_written_here(flag: str, path: Path) -> bool:
    """Return True if it is an empty file, or one that begins as those that the option writes."""
    keys = {"output": {"results", "differences"}, "answers": {"adapter", "measure"}}
    try:
        if not path.is_file():  # a pipe, a device, a link to nothing
            return False
        if path.stat().st_size == 0:
            return True
        with path.open(encoding="utf-8") as file:
            found = parse_json(file.readline() if flag == "answers" else file.read(MOST_BYTES))
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and keys[flag] <= found.keys()


def bad_options(flat: Mapping[str, Any]) -> list[str]:
    """Return a message for each training option whose value evaluation cannot work with.

    Args:
        flat: {option: value} of all options, without dashes.

    Returns:
        The messages; empty if all options are right.
    """
    problems = missing_files(flat)
    if flat["task"] != "causal_lm":
        problems.append(
            f"--task must be causal_lm for launcher/eval.py, got {flat['task']}. To evaluate a "
            "classifier, use launcher/train.py, which reports its loss and accuracy on --eval_data"
        )
    if flat["eval_data"] is None and flat["data"] != "default":
        problems.append(
            "--eval_data is missing. Give a file, folder or hub id of examples to evaluate on"
        )
    elif flat["eval_data"] is not None:
        problems += missing_source("eval_data", flat["eval_data"])
    return problems


TAKEN = {"ds_config", "device", "collective_timeout", "debug"}
"""Options of the section of a run that evaluation takes too."""
OF_TRAINING = {
    f.name: ""
    for part in (AdapterConfig, TrainConfig, RunConfig)
    for f in fields(part)
    if f.name not in TAKEN
} | {
    "init_adapter": "To evaluate an adapter, use --adapter",
    "max_samples": "To evaluate a part of the data, use --limit",
    "micro_batch_size": "Use --batch_size",
    "data": "Use --eval_data",
    "packing": "",
    "gradient_checkpointing": "",
    "label_field": "",
    "text_pair_field": "",
}
"""Options of a training run without effect on an evaluation, and what to do instead."""

PROGRAM = Program(
    name="launcher/eval.py",
    usage="deepspeed launcher/eval.py --model M --adapter A --eval_data FILE --metrics loss [...]",
    description="Measure loss and accuracy of a sharded model, with or without an adapter.",
    own=EvalConfig,
    trains=False,
    common=tuple(COMMON),
    ignored=OF_TRAINING,
    check=bad_options,
)


def load_request(argv: Sequence[str]) -> EvalRequest:
    """Parse the command line of launcher/eval.py and the YAML file that its --config names.

    Args:
        argv: The command line's arguments, without the program's name.

    Returns:
        The checked options, and the data to evaluate on.

    Raises:
        ConfigError: Some options are wrong. Its message lists all problems.
    """
    config, own = read_options(argv, PROGRAM)
    source = eval_source(config.data)
    assert source is not None, "bad_options has checked eval_data"
    return EvalRequest(config=config, own=own, source=source)
