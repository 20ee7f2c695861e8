"""Loads the sharded base with one adapter. The LoRA rank may differ from site to site."""

from dataclasses import replace
from typing import Any

from sparse_lora_dist.adapter.peft_agrees import without_tensors
from sparse_lora_dist.base_model.shard_loader import is_experts
from sparse_lora_dist.config.config import Config
from sparse_lora_dist.config.sections import AdapterConfig
from sparse_lora_dist.distributed.phases import fail_together
from sparse_lora_dist.errors import UserError
from sparse_lora_dist.evaluation.adapters import Adapter
from sparse_lora_dist.methods import Method
from sparse_lora_dist.model.model import Model
from sparse_lora_dist.model.targets import NO_FIT, READ, TIED, in_short
from sparse_lora_dist.training.trained_over import check_base

PLAIN = Method(name="lora")
"""The method of every adapter that is evaluated: plain LoRA."""


def open_model(config: Config, adapter: Adapter) -> tuple[Model, Adapter]:
    """Open the base with room for an adapter, but without any weights. Collective.

    To be called before ``load``.

    Args:
        config: Options of the evaluation; their adapter options are not used.
        adapter: The adapter. It decides which linears get an adapter, with which ranks.

    Returns:
        (the model, whose ``sites`` are the adapter's linears in the model's order; the adapter,
        with the model's names).

    Raises:
        UserError: The adapter does not fit the base. Raised on every rank.
    """
    wanted = AdapterConfig(rank=1, target_modules=".*", modules_to_save=adapter.full)
    try:
        model = Model.open(replace(config, adapter=wanted), all_sites=True)
    except UserError as error:
        if not str(error).startswith(NO_FIT):
            raise
        if TIED in str(error):
            raise UserError(
                f"The adapter {adapter.name} holds the embeddings, which this base ties to its "
                "output head. If they are the base's own, save the adapter without them: "
                "save_pretrained(..., save_embedding_layers=False). If they were trained, evaluate "
                "the merged model with --model.",
                shared=True,
            ) from error
        raise _does_not_fit(adapter, str(error).removeprefix(NO_FIT)) from error
    with fail_together("comparing the base with the adapter's"):
        if adapter.shapes:
            check_base(adapter.name, model)
    adapter = adapter.renamed(model.our_name)
    linears = {site.name: site for site in model.sites}
    has = {*adapter.scales, *adapter.full}
    adapter = replace(adapter, lacking=without_tensors(adapter.config, [*linears], has))
    absent = [site for site in adapter.scales if site not in linears]
    if absent and any(map(is_experts, model.module.modules())):
        raise UserError(
            f"The adapter {adapter.name} cannot be evaluated: its {absent[0]} is no linear of this "
            "model. Routers and experts get no adapter here. Merge it into its base with PEFT's "
            "merge_and_unload, and evaluate the result with --model.",
            shared=True,
        )
    if absent:
        raise _does_not_fit(adapter, f"the model has no linear named {absent[0]}")
    if passed := [site for site in adapter.scales if site in model.look.read]:
        raise UserError(
            f"The adapter {adapter.name} cannot be evaluated: it has {in_short(passed)}, but "
            f"{READ}. Merge it into its base with launcher/export.py --format merged, or with "
            "PEFT's merge_and_unload, and evaluate the result with --model.",
            shared=True,
        )
    model.sites = [  # in the model's order
        replace(site, rank=adapter.shapes[f"{name}.lora_a"][0])
        for name, site in linears.items()
        if name in adapter.scales
    ]
    ours = model.trained_shapes(PLAIN)
    for name, shape in adapter.shapes.items():
        if shape != ours.get(name):
            here = f"needs {list(ours[name])}" if name in ours else "has no such tensor"
            raise _does_not_fit(
                adapter, f"its {name} has shape {list(shape)}, but the model {here}"
            )
    return model, adapter


def _does_not_fit(adapter: Adapter, problem: str) -> UserError:
    return UserError(
        f"The adapter {adapter.name} does not fit --model: {problem.removesuffix('.')}. Give the "
        "adapter's base with --model.",
        shared=True,
    )


def load(config: Config, model: Model, adapter: Adapter, engine_config: dict[str, Any]) -> None:
    """Load this rank's shards of the base and of the adapter, and freeze both. Collective.

    Args:
        config: Options of the evaluation.
        model: The model that ``open_model`` returned for the adapter. It is changed in place.
        adapter: The adapter.
        engine_config: The DeepSpeed configuration.
    """
    model.load(config, PLAIN, engine_config, adapter.values)
    for linear in model.adapters:
        linear.scale = adapter.scales[linear.site.name]
    model.module.requires_grad_(False)
