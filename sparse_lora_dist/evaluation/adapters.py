"""A PEFT LoRA adapter to evaluate, of any ranks and scales."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from sparse_lora_dist.adapter.peft_config import CONFIG, other_kind, scale_of
from sparse_lora_dist.adapter.peft_read import open_peft
from sparse_lora_dist.checkpoint.manifest import MANIFEST
from sparse_lora_dist.config.config import Config
from sparse_lora_dist.config.paths import resolve_default
from sparse_lora_dist.distributed.phases import fail_together, first_on_its_node
from sparse_lora_dist.errors import UserError
from sparse_lora_dist.run_folder.description import RUN_YAML
from sparse_lora_dist.zero3.shares import Values

AS_TRAINED = ("quantization", "double_quant", "precision", "chat_template", "train_on")
"""Options that decide what an adapter is worth; another one may be meant."""


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """What is read of one; without an adapter there is nothing in it."""

    name: str
    values: Mapping[str, Values] = field(default_factory=dict)
    """By "site.lora_a", "site.lora_b", and "name.weight" for modules trained in full."""
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Of the same."""
    scales: Mapping[str, float] = field(default_factory=dict)
    """Site -> what its delta is multiplied by."""
    base: str | None = None
    """What it says it was trained over."""

    @property
    def full(self) -> tuple[str, ...]:
        """Modules trained in full."""
        owners = [n.rpartition(".")[0] for n in self.shapes if not n.endswith(("lora_a", "lora_b"))]
        return tuple(dict.fromkeys(owners))


def open_adapters(names: Sequence[str | None]) -> list[Adapter]:
    """Those of PEFT's folders, of runs' folders, or of the hub; None is the base. Collective;
    values are read later.

    Raises:
        UserError: with all that are not there, or of a kind that is not a plain LoRA.
    """
    adapters, problems = [], []
    with fail_together("opening adapters"), first_on_its_node():
        for name in names:
            try:
                adapters.append(_open(name))
            except UserError as error:
                problems.append(str(error))
        if problems:
            raise UserError("\n".join(problems))
    return adapters


def _open(name: str | None) -> Adapter:
    if name is None:
        return Adapter(name="base")
    folder = Path(name).expanduser()
    if (folder / "adapter" / CONFIG).exists():
        folder = folder / "adapter"
    elif not (folder / CONFIG).exists() and any(
        (folder / n).exists() for n in (RUN_YAML, MANIFEST)
    ):
        raise UserError(
            f"adapter {name} has no adapter yet, only checkpoints: write one with "
            f"launcher/export.py {name} --output FOLDER, and name that"
        )
    config, values, shapes = open_peft(str(folder), "adapter")
    if why := _not_plain(config, shapes):
        raise UserError(
            f"adapter {name} is not a plain LoRA adapter: {why}. Merge it (launcher/export.py "
            "--format merged) and name the result with --model."
        )
    ranks = {n.removesuffix(".lora_a"): s[0] for n, s in shapes.items() if n.endswith("lora_a")}
    scales = {site: scale_of(config, site, rank) for site, rank in ranks.items()}
    base = config.get("base_model_name_or_path")
    return Adapter(name=name, values=values, shapes=shapes, scales=scales, base=base)


def _not_plain(config: Mapping[str, Any], shapes: Collection[str]) -> str | None:
    if other := other_kind(config):
        return f"it has {other}"
    if odd := [n for n in shapes if "lora_" in n and not n.endswith(("lora_a", "lora_b"))]:
        return f"it holds {odd[0]}"
    halves = ({n[:-7] for n in shapes if n.endswith(half)} for half in (".lora_a", ".lora_b"))
    if alone := set.symmetric_difference(*halves):
        return f"{min(alone)} has one of lora_A and lora_B only"
    return None


def unlike_training(adapter: Adapter, config: Config) -> list[str]:
    """What a run that wrote ``adapter`` had otherwise, where it left word of it."""
    notes = []
    here = resolve_default("model", config.model.model)
    if adapter.base and Path(adapter.base).name != Path(here).name:
        notes.append(f"it was trained over {adapter.base}, this is {here}")
    folder = Path(adapter.name).expanduser()
    run = next((p for p in (folder / RUN_YAML, folder.parent / RUN_YAML) if p.is_file()), None)
    if run is not None:
        now, then = config.as_flat_dict(), yaml.safe_load(run.read_text())
        differ = [n for n in AS_TRAINED if n in then and then[n] != now[n]]
        notes += [f"it was trained with {n} {then[n]}, here it is {now[n]}" for n in differ]
        notes += [f"--config {run} evaluates it as it was trained"] if differ else []
    return notes
