"""Builds a model on the meta device from its config.json."""

from pathlib import Path

import torch
from transformers import CONFIG_MAPPING, PretrainedConfig

from sparse_lora_dist.base_model.architecture import (
    PRECISIONS,
    meta_model,
    read_config,
    read_content,
    refuse_experts,
    resolve_folder,
)
from sparse_lora_dist.config.config import Config
from sparse_lora_dist.config.paths import resolve_default
from sparse_lora_dist.model.attention import plan_attention
from sparse_lora_dist.model.look import look_at, settle_packing
from sparse_lora_dist.model.targets import find_full, find_sites
from sparse_lora_dist.plan.playback.llama_sizes import as_llama
from sparse_lora_dist.plan.playback.parameters import FILE_ITEMSIZE
from sparse_lora_dist.plan.scenario import Shapes
from sparse_lora_dist.tasks import TASKS
from sparse_lora_dist.tasks.class_head import Head, beside_base, modules_inside

CONFIG_PATTERNS = ["config.json", "*.py"]
"""Files of a model that are downloaded; weights are not among them."""


def shapes_of(config: Config, *, whole_logits: bool = False, on_gpu: bool = False) -> Shapes:
    """Build the model that ``config`` names on the meta device, and find its target modules.

    config.json and Python files of the model are downloaded if ``--model`` is a name on the hub. No
    weight is downloaded or read.

    Args:
        config: all options of the run.
        whole_logits: True if the logits of all tokens are computed at once, False if in chunks.
        on_gpu: True if the ranks have GPUs, which have an attention of their own.

    Returns:
        The model, the linears that get adapters, and the names of modules trained in full.

    Raises:
        UserError: if config.json is missing, invalid, or lacks sizes that are needed, or
            ``--attn_implementation varlen`` cannot be used.
    """
    options = config.model
    place = resolve_default("model", options.model)
    folder = resolve_folder(place, options.revision, patterns=CONFIG_PATTERNS)
    architecture, notes = read_architecture(folder, trust_remote_code=options.trust_remote_code)
    in_file = getattr(architecture, "dtype", None)  # before the model has that of the run
    model = meta_model(
        architecture,
        task=options.task,
        dtype=PRECISIONS[options.precision],
        attn_implementation=options.attention_of_transformers,
        trust_remote_code=options.trust_remote_code,
    )
    refuse_experts(model)
    head = Head(modules=beside_base(model) if TASKS[options.task].trains_head else {})
    full = {**head.modules, **find_full(model, config.adapter.modules_to_save, head)}
    trained = modules_inside(full)
    look = look_at(model, options.task)
    plan_attention(config, model, on_gpu=on_gpu)
    config, packing = settle_packing(config, look, architecture.model_type)
    sites, left_out = find_sites(model, config.adapter, trained, look)
    return Shapes(
        model=model,
        sites=tuple(sites),
        whole=look.read,
        trained=tuple(trained),
        config=config,
        whole_logits=whole_logits,
        file_itemsize=in_file.itemsize if isinstance(in_file, torch.dtype) else FILE_ITEMSIZE,
        notes=[*notes, *packing, *left_out],
    )


def read_architecture(
    folder: Path, *, trust_remote_code: bool
) -> tuple[PretrainedConfig, list[str]]:
    """Read the config.json of a model.

    An architecture that transformers does not know is planned as a Llama, if config.json has the
    sizes of one.

    Args:
        folder: the folder of the model.
        trust_remote_code: True if code from the folder may define the architecture.

    Returns:
        The model's config and an empty list. If a Llama is planned in its place: the Llama's
        config, and a list with one sentence that tells the user so.

    Raises:
        UserError: if config.json is missing, invalid, or lacks sizes that are needed.
    """
    file = folder / "config.json"
    content = read_content(folder) if file.exists() else {}
    kind = content.get("model_type")
    own_code = trust_remote_code and "auto_map" in content
    if not file.exists() or (isinstance(kind, str) and kind in CONFIG_MAPPING) or own_code:
        return read_config(folder, trust_remote_code=trust_remote_code), []
    problem = f"transformers does not know the architecture {kind!r}"
    return as_llama(content, problem), [
        f"{problem}, so the model is planned as a Llama of the same sizes"
    ]
