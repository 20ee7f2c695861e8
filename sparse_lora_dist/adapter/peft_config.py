"""Read the type and the scaling factors (alpha / r) of a PEFT adapter from its adapter_config.json,
and give the names of an adapter's files."""

from collections.abc import Mapping
from dataclasses import fields
from math import isfinite, sqrt
from typing import Any

from peft import LoraConfig

from sparse_lora_dist.system.patterns import bad_regex, first_that_ends

PREFIX = "base_model.model."
"""Prefix that PEFT adds to the model's own parameter names."""
CONFIG = "adapter_config.json"
"""File name of an adapter's configuration."""
WEIGHTS, APART = "adapter_model.safetensors", "modules_to_save.safetensors"
"""Names of the files with an adapter's tensors. PEFT knows only the first. The second is written by
this project's export with --uniform_rank: it holds modules trained in full."""
LABELS = "id2label.json"
"""Name of the file with a classifier's class names. This project writes it; PEFT does not."""

MARKED = [f.name for f in fields(LoraConfig) if f.metadata.get("is_lora_variant")]
"""Fields of ``LoraConfig`` that PEFT itself marks as selecting a variant of LoRA."""
VARIANTS = (*MARKED, "use_qalora", "target_parameters")
"""Fields of adapter_config.json that select a variant of LoRA (DoRA, QA-LoRA ...) if they are
set."""
PLAIN = """
    task_type peft_type auto_mapping peft_version base_model_name_or_path revision inference_mode r
    target_modules exclude_modules lora_alpha lora_dropout fan_in_fan_out use_rslora
    modules_to_save init_lora_weights layers_to_transform layers_pattern rank_pattern alpha_pattern
    loftq_config eva_config corda_config lora_ga_config megatron_core runtime_config
""".split()
"""Fields of ``LoraConfig`` with which an adapter stays plain LoRA, or which are looked at apart.
Any other, such as bias or layer_replication, changes what PEFT computes if it is not the
default."""
KNOWN = {f.name for f in fields(LoraConfig)} | {*VARIANTS, *PLAIN}
"""Fields that this version of PEFT has. A switch of a newer version, if it is on, may change what
is computed."""

PLAIN_STARTS = (None, True, False, "gaussian", "eva", "orthogonal", "mica")
"""Values of ``init_lora_weights`` with which PEFT leaves the base's weights as they are. With any
other, such as pissa, olora, corda, loftq or lora_ga, PEFT subtracts the first B A from the base, or
replaces its weights, and such an adapter is trained over these weights."""


def other_kind(config: Mapping[str, Any]) -> str | None:
    """Return what makes an adapter other than plain LoRA (whose update is scale * B A).

    Args:
        config: contents of adapter_config.json.

    Returns:
        Words for an error message. If the adapter is not of PEFT's type LORA, "the type X" with
        the name of its type. If it is a variant of LoRA, the name of the first field of
        ``VARIANTS`` that is set. If another field changes what PEFT computes, or PEFT does not know
        it, its name and value. If its initial values change the base's weights, what
        ``init_lora_weights`` is. None for plain LoRA.
    """
    if config.get("peft_type") != "LORA":
        return f"the type {config.get('peft_type')}"
    if variant := next((name for name in VARIANTS if _is_set(config.get(name))), None):
        return variant
    for field in fields(LoraConfig):
        value = config.get(field.name)
        if field.name not in PLAIN and _is_set(value) and value != field.default:
            return f"{field.name} {value!r}"
    for name, value in config.items():
        if name not in KNOWN and value is True:
            return f"{name} {value!r}, which this version of PEFT does not know"
    start = config.get("init_lora_weights")
    if (start.lower() if isinstance(start, str) else start) in PLAIN_STARTS:
        return None
    return (
        f"init_lora_weights {start!r}, with which PEFT changes the base's weights "
        "(PEFT's save_pretrained with path_initial_model_for_weight_conversion makes it plain)"
    )


def _is_set(value: object) -> bool:
    """Return True for {} too: PEFT makes the variant's configuration with its defaults of it."""
    return bool(value) or value == {}


def faults_of(config: Mapping[str, Any]) -> list[str]:
    """Check the values of an adapter's configuration that are read: those of ``scale_of``, and the
    name of the base.

    Args:
        config: contents of adapter_config.json.

    Returns:
        One message per problem, to be joined by "; "; an empty list if all values are right.
    """
    own, base = config.get("alpha_pattern") or {}, config.get("base_model_name_or_path")
    if not isinstance(own, dict):
        return [f"alpha_pattern must map names to numbers, got {own!r}"]
    alphas = {"lora_alpha": config.get("lora_alpha"), **own}
    problems = [
        f"alpha {name!r} must be a number, got {alpha!r}"
        for name, alpha in alphas.items()
        if type(alpha) not in (int, float) or not isfinite(alpha)
    ]
    if base is not None and not isinstance(base, str):
        problems.append(f"base_model_name_or_path must be text, got {base!r}")
    return problems + [fault for key in own for fault in bad_regex("alpha_pattern", key)]


def scale_of(config: Mapping[str, Any], site: str, rank: int) -> float:
    """Return the factor ``scale`` of one module's update, scale * B A, as PEFT computes it.

    The scale is alpha / rank, or alpha / sqrt(rank) for rsLoRA (Kalajdzievski 2023,
    arXiv:2312.03732). A key of ``alpha_pattern`` is a regular expression that must match the end of
    the module's name; its value replaces ``lora_alpha``.

    Args:
        config: contents of adapter_config.json, checked by ``faults_of``.
        site: name of the module in the base model.
        rank: rank of the module's A and B, above 0.

    Raises:
        UserError: a key of ``alpha_pattern`` takes too long to match.
    """
    alphas: dict[str, float] = config.get("alpha_pattern") or {}
    key = first_that_ends("alpha_pattern", list(alphas), site)
    alpha: float = alphas.get(key or site, config["lora_alpha"])
    return float(alpha / sqrt(rank) if config.get("use_rslora") else alpha / rank)
