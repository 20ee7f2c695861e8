"""The evaluation's command line: every option of a run, and a few of its own."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparse_lora_dist.config.checks import at_least, raise_if
from sparse_lora_dist.config.config import Config
from sparse_lora_dist.config.load import read_options
from sparse_lora_dist.config.paths import eval_source, looks_local, missing_files, missing_source
from sparse_lora_dist.config.schema import Program
from sparse_lora_dist.config.sections import RunConfig
from sparse_lora_dist.config.spelling import did_you_mean

METRICS = ("loss", "choice", "choice_generated", "exact", "gsm8k")
BASE = "base"
"""The word for no adapter."""


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Evaluation: of what, by which measure. The data are --eval_data"""

    adapter: str | None = None
    """PEFT LoRA adapter: its folder, a run's folder, or a hub id; null is the base by itself."""
    compare: tuple[str, ...] = ()
    """Several of these (base for none), each set against the first; in place of --adapter."""
    metrics: tuple[str, ...] = ("loss",)
    """What is measured: loss, choice (by likelihood), choice_generated, exact, gsm8k."""
    batch_size: int = 8
    """Rows of one batch, which one rank takes. Examples are cut into batches in their order."""
    max_new_tokens: int = 256
    """Tokens of an answer that is generated, at most."""
    limit: int | None = None
    """Use the first so many examples only; null uses all."""
    output: str | None = None
    """JSON file for the results; null only prints them."""
    answers: str | None = None
    """File of JSON lines for each example's number and what the model said; null keeps none."""
    overwrite: bool = False
    """May --output and --answers replace a file?"""

    def __post_init__(self) -> None:
        problems = at_least(self, 1, "batch_size", "max_new_tokens", "limit")
        problems += [
            f"metrics knows {', '.join(METRICS)}, got {name!r}{did_you_mean(name, METRICS)}"
            for name in self.metrics
            if name not in METRICS
        ]
        if not self.metrics:
            problems.append(f"metrics is empty: name some of {', '.join(METRICS)}")
        if self.compare and self.adapter is not None:
            problems.append("adapter and compare exclude each other: name all of them in compare")
        for name in self.names:
            if name is not None and looks_local(name) and not Path(name).expanduser().exists():
                flag = "compare" if self.compare else "adapter"
                problems.append(f"{flag}: no such folder, and no hub id: {name}")
        for flag, path in self.files.items():
            problems += bad_output(flag, path, overwrite=self.overwrite)
        raise_if(problems)

    @property
    def files(self) -> dict[str, Path]:
        """What is written, by option."""
        given = {"output": self.output, "answers": self.answers}
        return {flag: Path(p).expanduser() for flag, p in given.items() if p is not None}

    @property
    def names(self) -> tuple[str | None, ...]:
        """The adapters, as the user calls them; None is the base by itself."""
        named = self.compare or (self.adapter,)
        return tuple(None if name == BASE else name for name in named)


@dataclass(frozen=True, kw_only=True)
class EvalRequest:
    """How model and data are read, and what is asked about them."""

    config: Config
    own: EvalConfig
    source: str
    """Path or hub id of the examples."""

    @property
    def run(self) -> RunConfig:
        """Where ``run_program`` looks for --debug."""
        return self.config.run


def bad_output(flag: str, path: Path, *, overwrite: bool) -> list[str]:
    """A line when results must not be written there."""
    if path.is_dir():
        return [f"{flag} is a folder, must be a file: {path}"]
    if path.exists() and not overwrite:
        return [f"{flag} is there already: {path}. Give --overwrite, or another name"]
    return []


def bad_options(flat: Mapping[str, Any]) -> list[str]:
    """A line for each option of a run that evaluation cannot do with."""
    problems = missing_files(flat)
    if flat["task"] != "causal_lm":
        problems.append(
            f"task must be causal_lm here, got {flat['task']}: of a classifier, launcher/train.py "
            "says loss and accuracy on its --eval_data"
        )
    if flat["eval_data"] is None and flat["data"] != "default":
        problems.append("eval_data is missing: the examples to evaluate on")
    elif flat["eval_data"] is not None:
        problems += missing_source("eval_data", flat["eval_data"])
    return problems


PROGRAM = Program(
    name="launcher/eval.py",
    usage="deepspeed launcher/eval.py --model M --adapter A --eval_data FILE --metrics loss [...]",
    description="Held-out loss and accuracy of a sharded model, with an adapter or without.",
    own=EvalConfig,
    trains=False,
    check=bad_options,
)


def load_request(argv: Sequence[str]) -> EvalRequest:
    """What ``argv`` (without the program's name) and its YAML file ask.

    Raises:
        ConfigError: with every problem there is.
    """
    config, own = read_options(argv, PROGRAM)
    source = eval_source(config.data)
    assert source is not None, "bad_options has seen to it"
    return EvalRequest(config=config, own=own, source=source)
