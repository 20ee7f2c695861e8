"""Opens the PEFT LoRA adapters to evaluate.

Each site, i.e. linear with an adapter, may have its own rank and scale.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from shlex import quote
from typing import Any

from sparse_lora_dist.adapter.peft_agrees import disagreements, ranks_of
from sparse_lora_dist.adapter.peft_config import APART, CONFIG, faults_of, other_kind, scale_of
from sparse_lora_dist.adapter.peft_read import open_peft
from sparse_lora_dist.checkpoint import published
from sparse_lora_dist.checkpoint.manifest import MANIFEST, step_of
from sparse_lora_dist.config.config import Config
from sparse_lora_dist.config.paths import expanded, resolve_default
from sparse_lora_dist.config.yaml_file import read_entries
from sparse_lora_dist.distributed.phases import fail_together, first_on_its_node
from sparse_lora_dist.errors import UserError, as_user_error
from sparse_lora_dist.model.targets import in_short
from sparse_lora_dist.run_folder.attempts import NAME as ATTEMPTS
from sparse_lora_dist.run_folder.description import RUN_YAML
from sparse_lora_dist.run_folder.identity import READS_TEXT, WORDS
from sparse_lora_dist.run_folder.metrics_file import read_records
from sparse_lora_dist.training.feed import identity_of_tokenizer
from sparse_lora_dist.training.trained_over import other_name, trained_over
from sparse_lora_dist.zero3.slices import Values

TRAINING_OPTIONS = ("quantization", "double_quant", "precision", "chat_template", "train_on")
"""Options that change an adapter's results if their values differ from training. A difference is
printed as a note and is no error, since it may be intended."""


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """A PEFT LoRA adapter, opened but not loaded. All mappings are empty for the base alone."""

    name: str
    """The adapter as the user named it, or "base"."""
    values: Mapping[str, Values] = field(default_factory=dict)
    """Tensor name -> function (start, stop) that reads entries of the flattened tensor from disk.

    Names are "SITE.lora_a" and "SITE.lora_b" with the name of a site, and e.g. "MODULE.weight" with
    the name of a module trained in full.
    """
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Tensor name -> shape, for the tensors in ``values``."""
    scales: Mapping[str, float] = field(default_factory=dict)
    """Site name -> factor of B A: alpha / r, or alpha / sqrt(r) for rsLoRA, with r its rank."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """Content of its adapter_config.json."""
    lacking: Sequence[str] = ()
    """Linears of the model that the configuration names, but that have no tensors; known once the
    model is opened."""
    base: str | None = None
    """Base model that the adapter's adapter_config.json names; None if it names none."""

    def renamed(self, our_name: Callable[[str], str]) -> "Adapter":
        """Return the adapter with other names of its tensors and sites.

        Args:
            our_name: function that returns the name in the model, given the adapter's.
        """
        return replace(
            self,
            values={our_name(name): read for name, read in self.values.items()},
            shapes={our_name(name): shape for name, shape in self.shapes.items()},
            scales={our_name(name): scale for name, scale in self.scales.items()},
        )

    @property
    def full(self) -> tuple[str, ...]:
        """Names of the modules trained in full."""
        owners = [n.rpartition(".")[0] for n in self.shapes if not n.endswith(("lora_a", "lora_b"))]
        return tuple(dict.fromkeys(owners))


def open_adapters(names: Sequence[str | None]) -> list[Adapter]:
    """Open adapters, reading their shapes and settings but no tensors. Collective.

    Args:
        names: PEFT folders, run folders or hub ids; None stands for the base without an adapter.

    Returns:
        The adapters in the order of ``names``.

    Raises:
        UserError: Some adapters are missing or are not plain LoRA. The message names all of them.
            Raised on every rank.
    """
    adapters, problems = [], []
    with fail_together("opening adapters"), first_on_its_node():
        for name in names:
            try:
                with as_user_error(f"--adapter {name}", "Export or copy the adapter again."):
                    adapters.append(_open(name))
            except UserError as error:
                problems.append(str(error))
        if problems:
            raise UserError("\n".join(problems))
    return adapters


def _open(name: str | None) -> Adapter:
    """Open one adapter; raise UserError if it is missing or is not a plain LoRA."""
    if name is None:
        return Adapter(name="base")
    folder = Path(expanded(name))
    # As PEFT, which keeps an adapter called "adapter" beside one at the folder's root.
    if not (folder / CONFIG).exists() and (folder / "adapter" / CONFIG).exists():
        folder = folder / "adapter"
    elif not (folder / CONFIG).exists() and any(
        (folder / n).exists() for n in (RUN_YAML, MANIFEST)
    ):
        raise UserError(
            f"The adapter {name} is a run or checkpoint folder without an exported adapter. Run "
            f"launcher/export.py {quote(name)} --output FOLDER, and evaluate FOLDER. If its method "
            "has no such adapter, add --format merged, and give FOLDER to --model."
        )
    config, values, shapes = open_peft(str(folder), "adapter")
    if not shapes:
        raise UserError(
            f"The adapter {name} has no tensors, so it is the base itself. Export it again. To "
            "evaluate the base, leave --adapter out, or name it as base in --compare."
        )
    if empty := next((n for n, shape in shapes.items() if 0 in shape), None):
        raise UserError(
            f"The adapter {name} has an empty tensor, {empty}: it was saved without gathering its "
            "parts (DeepSpeed ZeRO-3). Save it again, with the parameters gathered "
            "(stage3_gather_16bit_weights_on_model_save, or zero_to_fp32.py)."
        )
    if why := _why_not_plain(config, shapes):
        raise UserError(
            f"The adapter {name} is not a plain LoRA adapter: {why}. Merge it into its base, a run "
            "of this program with launcher/export.py --format merged, another with PEFT's "
            "merge_and_unload, and evaluate the result with --model."
        )
    if faults := faults_of(config):
        raise UserError(
            f"The adapter {name} has wrong values in {CONFIG}: {'; '.join(faults)}. Correct them "
            "in this file."
        )
    ranks, full = ranks_of(shapes), [n for n in shapes if not n.endswith(("lora_a", "lora_b"))]
    try:
        scales = {site: scale_of(config, site, rank) for site, rank in ranks.items()}
        problems = disagreements(config, ranks, full)
    except UserError as error:
        raise UserError(f"The adapter {name} cannot be used: {error}") from error
    if problems:
        raise UserError(
            f"The adapter {name} and its {CONFIG} disagree: {'; '.join(problems)}. Export or save "
            "the adapter again, or correct this file."
        )
    base = config.get("base_model_name_or_path")
    return Adapter(name=name, values=values, shapes=shapes, scales=scales, config=config, base=base)


def _why_not_plain(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """Return why an adapter is not a plain LoRA, as a clause for a message; None if it is one.

    Args:
        config: Content of adapter_config.json.
        shapes: Names and shapes of the adapter's tensors.
    """
    if other := other_kind(config):
        return f"its adapter_config.json has {other}"
    if odd := [n for n in shapes if "lora_" in n and not n.endswith(("lora_a", "lora_b"))]:
        return f"its weight file has the tensor {odd[0]}"
    halves = ({n[:-7] for n in shapes if n.endswith(half)} for half in (".lora_a", ".lora_b"))
    if alone := set.symmetric_difference(*halves):
        return f"{min(alone)} has only one of lora_A and lora_B"
    for name, shape in shapes.items():
        if name.endswith(("lora_a", "lora_b")) and len(shape) != 2:
            return f"{name} has shape {list(shape)}, but must have two sizes"
    return None


def _older_than_the_run(folder: Path) -> list[str]:
    """Return a clause that says so if the adapter of a run folder is not that of its newest
    checkpoint: a run that was finished, or ended by --stop_after, and goes on or goes back.

    Args:
        folder: The run folder, or the folder of its adapter.
    """
    folder = folder.parent if (folder.parent / ATTEMPTS).exists() else folder
    attempts = folder / ATTEMPTS
    jobs = read_records(attempts) if attempts.exists() else []
    finished = [
        job["step"]
        for job in jobs
        if job.get("event") == "finished" or job.get("why") == "--stop_after"
    ]
    steps = [step_of(path) for path in published(folder / "checkpoints")]
    if not finished or not steps or steps[-1] == finished[-1]:
        return []
    return [
        f"{folder}/adapter is of step {finished[-1]}, and the run's newest checkpoint of "
        f"step {steps[-1]}. To evaluate that, export it with launcher/export.py to a folder of its "
        "own"
    ]


def differences_from_training(adapter: Adapter, config: Config, tokenizer: Any) -> list[str]:
    """Compare the settings of the evaluation with those that the adapter was trained with.

    Not collective. The name of the base model, the tokenizer, the chat template and the options in
    ``TRAINING_OPTIONS`` are compared.

    Args:
        adapter: The adapter. Its training options are known only if it is in a run folder.
        config: Options of the evaluation.
        tokenizer: The tokenizer of the evaluation.

    Returns:
        Clauses to print, one for each difference. If an option differs, a last clause says how to
        evaluate with the options of the training run. Empty if no difference is known.
    """
    notes = []
    here = resolve_default("model", config.model.model)
    if note := other_name(adapter.base, adapter.name, here) if adapter.shapes else None:
        notes.append(note)
    if adapter.lacking:
        notes.append(
            f"it has no tensors of {in_short(adapter.lacking)}, which {CONFIG} names: they are "
            "evaluated as they are in the base, as PEFT does with a warning. If they were trained, "
            "export or save the adapter again"
        )
    folder = Path(expanded(adapter.name))
    if found := trained_over(folder) if adapter.shapes else None:
        other = found[0].differences(identity_of_tokenizer(config, tokenizer), only=READS_TEXT)
        notes += [f"{WORDS[n]} is not the one that the adapter was trained with" for n in other]
    notes += _older_than_the_run(folder)
    if (folder / APART).exists():
        notes.append(f"the weights in {folder / APART} are used too, which PEFT does not read")
    run = next((p for p in (folder / RUN_YAML, folder.parent / RUN_YAML) if p.is_file()), None)
    if run is not None:
        try:
            then = {entry.name: entry.value for entry in read_entries(str(run), place=str(run))}
        except UserError as error:
            return [*notes, f"{error}, so its options are not compared with those given"]
        now = config.as_flat_dict()
        differ = [n for n in TRAINING_OPTIONS if n in then and then[n] != now[n]]
        notes += [
            f"the adapter was trained with --{n} {then[n]}, but is evaluated with {now[n]}"
            for n in differ
        ]
        if differ:
            notes.append(
                f"use --config {quote(str(run))} to evaluate it with the options it was trained "
                "with"
            )
    return notes
