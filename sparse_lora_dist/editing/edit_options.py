"""The editor's command line: every option of a run, and a few of its own."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path
from typing import Any

from sparse_lora_dist.config.checks import at_least, raise_if
from sparse_lora_dist.config.config import Config
from sparse_lora_dist.config.load import read_options
from sparse_lora_dist.config.schema import Program
from sparse_lora_dist.config.sections import RunConfig
from sparse_lora_dist.distributed.launch import this_launch
from sparse_lora_dist.editing.edit_file import read_edits
from sparse_lora_dist.editing.edits import Edit, Edits, numbered

RESULTS = "edits.json"
"""In the folder of the run."""
NUMBER = re.compile(r"\d+|\d*:\d*")


@dataclass(frozen=True, kw_only=True)
class EditConfig:
    """Edits: what is to be known, and what is asked afterwards"""

    edits: str | None = None
    """File of edits in KnowEdit's format, a JSON list or an object a line."""
    number: str | None = None
    """Which of them are made, together: one (7), or from one to before another (0:10); null: all.
    A step takes all of them, each once; gradient_accumulation_steps follows from that."""
    fluency_tokens: int = 100
    """Tokens of the texts that fluency is measured on; 0 measures none, and saves most of the
    time."""
    only_read: bool = False
    """Say what the file holds, and edit nothing."""
    overwrite: bool = False
    """Replace an earlier run in output_dir."""

    def __post_init__(self) -> None:
        problems = at_least(self, 0, "fluency_tokens")
        if self.edits is None:
            problems.append("edits is missing: name a file of them")
        elif not Path(self.edits).expanduser().is_file():
            problems.append(f"edits: no such file: {self.edits}")
        if self.number is not None and NUMBER.fullmatch(self.number) is None:
            problems.append(f"number must be like 7, 0:10 or 5:, got {self.number!r}")
        raise_if(problems)

    @property
    def path(self) -> Path:
        return Path(self.edits or "").expanduser()


@dataclass(frozen=True, kw_only=True)
class EditRequest:
    """A run, the edits it makes, and the file they are from."""

    config: Config
    options: EditConfig
    file: Edits
    edits: tuple[Edit, ...]

    @property
    def run(self) -> RunConfig:
        """Where ``run_program`` looks for --debug."""
        return self.config.run


RELEASED: dict[str, object] = {
    "method": "roselora",
    "roselora_preset": "released",
    "roselora_begin": 0.12,
    "roselora_end": 0.8,
    "rank": 8,
    "alpha": 32.0,
    "dropout": 0.1,
    "target_modules": ("q_proj", "v_proj"),
    "learning_rate": 5e-4,
    "lr_schedule": "constant",
    "max_steps": 25,
}
"""What RoseLoRA's released code edits with (hparams/ROSELORA; 3 and 20 of its 25 passes). There a
pass over several edits is a step each, and it ends early once the loss is below 0.1. Ours clips
gradients at the usual --max_grad_norm, of which its settings say nothing."""

PROGRAM = Program(
    name="launcher/edit.py",
    usage="deepspeed launcher/edit.py --ds_config ds_configs/zero3.json --model M --edits FILE "
    "[--number 0:10] [--option value ...]",
    description="Edit facts, and measure what else the edit changed. Defaults are those that "
    "RoseLoRA's released code edits with.",
    own=EditConfig,
    defaults=RELEASED
    | {"output_dir": "runs/edit", "sequence_length": 128, "packing": False, "trackers": ()},
)

NOT_FOR_EDITS = {
    "data": "the edits are what is learned",
    "eval_data": "edits have metrics of their own",
    "packing": "each edit is a row of its own",
    "modules_to_save": "taking the adapter away would not undo what they have learned",
    "verify": "launcher/train.py does that",
    "task": "edits are of language models",
    "init_adapter": "an edit is measured against the base, and undone by leaving its adapter away: "
    "merge the other one first (launcher/export.py --format merged)",
}


def load_request(argv: Sequence[str]) -> EditRequest:
    """What ``argv`` (without the program's name) and its YAML file ask.

    Raises:
        UserError: with every problem there is, those of the edit file last.
    """
    config, options = read_options(argv, PROGRAM)
    raise_if(_not_for_edits(config, options))
    file = read_edits(options.path)
    edits = numbered(file.edits, options.number, str(options.edits))
    return EditRequest(
        config=_with_all_in_a_step(config, options, len(edits)),
        options=options,
        file=file,
        edits=edits,
    )


def _not_for_edits(config: Config, options: EditConfig) -> list[str]:
    given: dict[str, Any] = config.as_flat_dict()
    usual = Config().as_flat_dict() | {"packing": False}
    earlier = {"data": options.edits}  # a run.yaml of ours, given back as --config
    problems = [
        f"{name} is not for edits: {why}"
        for name, why in NOT_FOR_EDITS.items()
        if given[name] not in (usual[name], earlier.get(name, usual[name]))
    ]
    results = Path(config.run.output_dir) / RESULTS
    if results.resolve() == options.path.resolve():
        problems.append(f"edits is {results}, which results will replace: take another output_dir")
    if config.train.max_steps is None:
        problems.append("max_steps must be a number: a step takes all edits, epochs mean nothing")
    if options.overwrite and config.run.resume != "never":
        problems.append("overwrite begins anew, and resume goes on: leave one of them out")
    return problems


def _with_all_in_a_step(config: Config, options: EditConfig, count: int) -> Config:
    rows = config.train.micro_batch_size * this_launch().world_size
    return replace(
        config,
        data=replace(config.data, data=str(options.edits)),
        train=replace(config.train, gradient_accumulation_steps=ceil(count / rows)),
    )
