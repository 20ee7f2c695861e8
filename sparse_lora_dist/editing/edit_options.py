"""Options of launcher/edit.py: those of a training run, and the editor's own."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path
from typing import Any

from sparse_lora_dist.config.checks import at_least, at_most, raise_if
from sparse_lora_dist.config.config import Config
from sparse_lora_dist.config.load import read_options
from sparse_lora_dist.config.paths import expanded, real_path
from sparse_lora_dist.config.schema import Program
from sparse_lora_dist.config.sections import RunConfig
from sparse_lora_dist.distributed.launch import this_launch
from sparse_lora_dist.editing.edit_file import read_edits
from sparse_lora_dist.editing.edits import Edit, Edits, numbered
from sparse_lora_dist.errors import as_user_error

COMMON = """
    model precision gradient_checkpointing sequence_length method rank alpha dropout target_modules
    max_steps micro_batch_size learning_rate seed ds_config output_dir
""".split()
"""Options of a training run that matter for edits, which ``--help`` shows."""
RESULTS = "edits.json"
"""Name of the result file in the run folder."""
NUMBER = re.compile(r"[0-9]{1,18}|[0-9]{0,18}:[0-9]{0,18}")
"""One number, or a range with a colon, either end of which may be left out."""


@dataclass(frozen=True, kw_only=True)
class EditConfig:
    """Edits: the facts to teach the model, and what is measured afterwards"""

    edits: str | None = None
    """File of edits in KnowEdit's format: a JSON list, or one JSON object per line."""
    number: str | None = None
    """Edits to make together, numbered from 0: one (7), or a range START:END without edit END
    (0:10). null: all. Every optimizer step trains on all of them; a given
    gradient_accumulation_steps is ignored."""
    fluency_tokens: int = 100
    """Length in tokens of the texts that fluency is measured on, at least 0. 0: fluency is not
    measured, which saves most of the time."""
    only_read: bool = False
    """Print what the file of edits holds, and edit nothing."""
    overwrite: bool = False
    """Replace an earlier run in output_dir."""

    def __post_init__(self) -> None:
        problems = at_least(self, 0, "fluency_tokens") + at_most(self, 2**20, "fluency_tokens")
        if self.edits is None:
            problems.append("--edits is missing. Name a file of edits")
        elif not Path(expanded(self.edits)).is_file():
            problems.append(f"--edits {self.edits} does not exist. Name a file of edits")
        if self.number is not None and NUMBER.fullmatch(self.number) is None:
            problems.append(f"--number must be like 7, 0:10 or 5:, got {self.number!r}")
        raise_if(problems)

    @property
    def path(self) -> Path:
        """Path of the file of edits."""
        return Path(expanded(self.edits or ""))


@dataclass(frozen=True, kw_only=True)
class EditRequest:
    """What launcher/edit.py was asked for: all options, and the edits to make."""

    config: Config
    """Options of the training run."""
    options: EditConfig
    """Options that only editing has."""
    file: Edits
    """Content of the whole file of edits."""
    edits: tuple[Edit, ...]
    """Edits to make: those of the file that --number selects."""

    @property
    def run(self) -> RunConfig:
        """Run options that ``run_program``, the main function of all programs, reads: --debug."""
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
"""Defaults of options, taken from RoseLoRA's released code for editing (hparams/ROSELORA).

The released code makes 25 passes over the edits and prunes from pass 3 to pass 20. Here, a pass is
one optimizer step on all edits. Differences to the released code:

- The released code takes one step per edit in a pass over several edits, and ends early once the
  loss is below 0.1. This project takes one step on all edits, and makes all passes.
- This project clips gradients at --max_grad_norm. The settings of the released code do not say
  whether it clips them.
"""

OF_DATA = dict.fromkeys(
    """
    text_field text_pair_field label_field column_names prompt_field response_field chat_template
    train_on eval_every eval_batches num_epochs
    """.split(),
    "",
) | {"max_samples": "To make some of the edits, use --number"}
"""Options of a training run without effect on edits, and what to do instead."""

PROGRAM = Program(
    name="launcher/edit.py",
    usage="deepspeed launcher/edit.py --ds_config zero3 --model M --edits FILE "
    "[--number 0:10] [--option value ...]",
    description="Edit facts, and measure what else the edits changed. Defaults are those of "
    "RoseLoRA's released code.",
    own=EditConfig,
    common=tuple(COMMON),
    defaults=RELEASED
    | {"output_dir": "runs/edit", "sequence_length": 128, "packing": False, "trackers": ()},
    ignored=OF_DATA,
)

NOT_FOR_EDITS = {
    "data": "the training data are the edits",
    "eval_data": "edits are measured by metrics of their own",
    "packing": "each edit is a row of its own",
    "modules_to_save": "removing the adapter would not undo what these modules learn",
    "verify": "this program checks no checkpoints. Use launcher/train.py --verify",
    "task": "only language models (causal_lm) can be edited",
    "init_adapter": "edits are measured against the base and undone by removing their adapter. "
    "Merge the other adapter into the base first (launcher/export.py --format merged)",
}
"""{option of a training run that cannot be used for edits: reason}.

The reasons are clauses of error messages.
"""


def load_request(argv: Sequence[str]) -> EditRequest:
    """Parse the command line of launcher/edit.py and its YAML file, and read the file of edits.

    Args:
        argv: The command line's arguments, without the program's name.

    Returns:
        The checked options, and the edits to make.

    Raises:
        ConfigError: Some options are wrong. Its message lists all problems.
        UserError: The file of edits has a problem.
    """
    config, options = read_options(argv, PROGRAM)
    raise_if(_not_for_edits(config, options))
    with as_user_error(f"--edits {options.edits}", "Give a JSON list, or one object per line."):
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
    earlier = {"data": options.edits}  # --config with the run.yaml of an earlier edit has it
    problems = [
        f"--{name} cannot be used for edits, because {why}"
        for name, why in NOT_FOR_EDITS.items()
        if given[name] not in (usual[name], earlier.get(name, usual[name]))
    ]
    results = Path(config.run.output_dir) / RESULTS
    if real_path("--output_dir", results) == real_path("--edits", options.path):
        problems.append(
            f"--edits is {results}, the file that the results would overwrite. Choose another "
            "--output_dir"
        )
    if config.train.max_steps is None:
        problems.append(
            "--max_steps must be a number for edits, got null, and --num_epochs has no effect. "
            "Set --max_steps"
        )
    if options.overwrite and config.run.resume != "never":
        problems.append(
            "--overwrite starts a new run, but --resume continues one. Leave one of them out"
        )
    return problems


def _with_all_in_a_step(config: Config, options: EditConfig, count: int) -> Config:
    rows = config.train.micro_batch_size * this_launch().world_size
    return replace(
        config,
        data=replace(config.data, data=str(options.edits)),
        train=replace(config.train, gradient_accumulation_steps=ceil(count / rows)),
    )
