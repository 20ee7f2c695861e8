"""File names in a PEFT adapter folder; the adapter's type and scales from adapter_config.json."""

from collections.abc import Mapping
from dataclasses import fields
from math import sqrt
from typing import Any

from peft import LoraConfig
from peft.utils.other import get_pattern_key

PREFIX = "base_model.model."
"""Prefix that PEFT adds to the model's own parameter names."""
CONFIG = "adapter_config.json"
WEIGHTS, APART = "adapter_model.safetensors", "modules_to_save.safetensors"
"""File names of the tensors. APART is this project's own file, not PEFT's: it holds modules trained
in full that were exported separately."""

MARKED = [f.name for f in fields(LoraConfig) if f.metadata.get("is_lora_variant")]
VARIANTS = (*MARKED, "use_qalora", "target_parameters")
"""Fields of adapter_config.json that select a variant of LoRA if they are set: DoRA, QA-LoRA ..."""


def other_kind(config: Mapping[str, Any]) -> str | None:
    """Return the PEFT type or field that makes an adapter other than plain LoRA (update B A).

    Args:
        config: contents of adapter_config.json.

    Returns:
        "the type X" for the PEFT type X; for LoRA, the name of the first field of ``VARIANTS`` that
        is set. None for plain LoRA.
    """
    if config.get("peft_type") != "LORA":
        return f"the type {config.get('peft_type')}"
    return next((name for name in VARIANTS if config.get(name)), None)


def scale_of(config: Mapping[str, Any], site: str, rank: int) -> float:
    """Return the scale of one module's update, scale * B A, as PEFT computes it.

    The scale is alpha / rank, or alpha / sqrt(rank) for rsLoRA (Kalajdzievski 2023,
    arXiv:2312.03732). A key of ``alpha_pattern`` is a regular expression that must match the end of
    the module's name; its value replaces ``lora_alpha``.

    Args:
        config: contents of adapter_config.json.
        site: name of the module.
        rank: rank of the module.
    """
    alphas: dict[str, float] = config.get("alpha_pattern") or {}
    alpha: float = alphas.get(get_pattern_key(list(alphas), site), config["lora_alpha"])
    return float(alpha / sqrt(rank) if config.get("use_rslora") else alpha / rank)
