"""The base, opened to carry an adapter whose modules have ranks and scales of their own."""

from dataclasses import replace
from typing import Any

from sparse_lora_dist.config.config import Config
from sparse_lora_dist.config.sections import AdapterConfig
from sparse_lora_dist.errors import UserError
from sparse_lora_dist.evaluation.adapters import Adapter
from sparse_lora_dist.methods import Method
from sparse_lora_dist.model.model import Model

PLAIN = Method(name="lora")


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
    return UserError(f"adapter {adapter.name} does not fit this model: {what}", shared=True)


def load(config: Config, model: Model, adapter: Adapter, engine_config: dict[str, Any]) -> None:
    """Read this rank's share of base and adapter; nothing trains. Collective."""
    model.load(config, PLAIN, engine_config, adapter.values)
    for linear in model.adapters:
        linear.scale = adapter.scales[linear.site.name]
    model.module.requires_grad_(False)
