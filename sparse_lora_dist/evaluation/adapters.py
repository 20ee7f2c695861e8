"""A PEFT LoRA adapter to evaluate, of any ranks and scales, and the base opened to carry it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from peft.utils.other import get_pattern_key

from sparse_lora_dist.config import AdapterConfig, Config
from sparse_lora_dist.errors import UserError
from sparse_lora_dist.export.init_adapter import open_peft
from sparse_lora_dist.methods import Method
from sparse_lora_dist.model import Model
from sparse_lora_dist.phases import first_on_its_node, together
from sparse_lora_dist.zero3 import Values

PLAIN = Method(name="lora")


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

    @property
    def full(self) -> tuple[str, ...]:
        """Modules trained in full."""
        owners = [n.rpartition(".")[0] for n in self.shapes if not n.endswith(("lora_a", "lora_b"))]
        return tuple(dict.fromkeys(owners))


def open_adapter(name: str | None) -> Adapter:
    """That of a PEFT folder, of a run's folder, or of the hub. Collective; values are read later.

    Raises:
        UserError: it is not there, or of a kind that is not a plain LoRA.
    """
    if name is None:
        return Adapter(name="base")
    with together("opening the adapter"), first_on_its_node():
        folder = Path(name).expanduser()
        is_run = (folder / "adapter" / "adapter_config.json").exists()
        config, values, shapes = open_peft(
            str(folder / "adapter") if is_run else str(folder), "--adapter"
        )
        odd = [n for n in shapes if "lora_" in n and not n.endswith(("lora_a", "lora_b"))]
        if config.get("peft_type") != "LORA" or config.get("use_dora") or odd:
            more = f": it holds {odd[0]}" if odd else ""
            raise UserError(f"--adapter {name} is not a plain LoRA adapter{more}")
        ranks = {n.removesuffix(".lora_a"): s[0] for n, s in shapes.items() if n.endswith("lora_a")}
        scales = {site: scale_of(config, site, rank) for site, rank in ranks.items()}
    return Adapter(name=name, values=values, shapes=shapes, scales=scales)


def scale_of(config: Mapping[str, Any], site: str, rank: int) -> float:
    """alpha / rank of one module, as PEFT has it: alpha_pattern names modules by the end of their
    names or by a regex, and rank-stabilised LoRA divides by the root."""
    alphas: dict[str, float] = config.get("alpha_pattern") or {}
    alpha: float = alphas.get(get_pattern_key(list(alphas), site), config["lora_alpha"])
    return float(alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank)


def open_model(config: Config, adapter: Adapter) -> Model:
    """The base with the adapter's modules as its sites, nothing read yet. Collective.

    Raises:
        UserError: the adapter is one of another base.
    """
    wanted = AdapterConfig(rank=1, target_modules=".*", modules_to_save=adapter.full)
    try:
        model = Model.open(replace(config, adapter=wanted))
    except UserError as error:
        if not str(error).startswith("--modules_to_save"):
            raise
        raise _misfit(adapter, str(error).partition(": ")[2]) from error
    linears = {site.name: site for site in model.sites}
    absent = [site for site in adapter.scales if site not in linears]
    if absent:
        raise _misfit(adapter, f"this model has no linear {absent[0]}")
    # In the model's order.
    model.sites = [
        replace(site, rank=adapter.shapes[f"{name}.lora_a"][0])
        for name, site in linears.items()
        if name in adapter.scales
    ]
    ours = model.trained_shapes(PLAIN)
    for name, shape in adapter.shapes.items():
        if shape != ours.get(name):
            here = list(ours[name]) if name in ours else "nothing so called"
            raise _misfit(adapter, f"{name} has shape {list(shape)}, this model makes it {here}")
    return model


def _misfit(adapter: Adapter, what: str) -> UserError:
    return UserError(f"--adapter {adapter.name} is of another base: {what}", shared=True)


def load(config: Config, model: Model, adapter: Adapter, engine_config: dict[str, Any]) -> None:
    """Read this rank's share of base and adapter; nothing trains. Collective."""
    model.load(config, PLAIN, engine_config, adapter.values)
    for linear in model.adapters:
        linear.scale = adapter.scales[linear.site.name]
    model.module.requires_grad_(False)
