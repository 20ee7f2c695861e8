"""File names of a PEFT adapter folder, and the kind and scales in its adapter_config.json."""

from collections.abc import Mapping
from dataclasses import fields
from math import sqrt
from typing import Any

from peft import LoraConfig
from peft.utils.other import get_pattern_key

PREFIX = "base_model.model."
"""What PEFT puts before the model's own parameter names."""
CONFIG = "adapter_config.json"
WEIGHTS, APART = "adapter_model.safetensors", "modules_to_save.safetensors"
"""APART is this project's own file, not PEFT's: modules trained in full, if exported separately."""

MARKED = [f.name for f in fields(LoraConfig) if f.metadata.get("is_lora_variant")]
VARIANTS = (*MARKED, "use_qalora", "target_parameters")
"""Fields that, when set, make the adapter something else than a plain LoRA: DoRA, QA-LoRA ..."""


def other_kind(config: Mapping[str, Any]) -> str | None:
    """Return why the adapter is not a LoRA with the update B A; None if it is one.

    Args:
        config: contents of adapter_config.json.

    Returns:
        "the type X" for another PEFT type, otherwise the first field of ``VARIANTS`` that is set.
    """
    if config.get("peft_type") != "LORA":
        return f"the type {config.get('peft_type')}"
    return next((name for name in VARIANTS if config.get(name)), None)


def scale_of(config: Mapping[str, Any], site: str, rank: int) -> float:
    """Return the factor of B A in one module's delta, as PEFT computes it.

    alpha / rank, or alpha / sqrt(rank) for rsLoRA (Kalajdzievski 2023, arXiv:2312.03732). A key of
    ``alpha_pattern`` matches the end of a module's name, as a regular expression.

    Args:
        config: contents of adapter_config.json.
        site: name of the module.
        rank: rank of the module.
    """
    alphas: dict[str, float] = config.get("alpha_pattern") or {}
    alpha: float = alphas.get(get_pattern_key(list(alphas), site), config["lora_alpha"])
    return float(alpha / sqrt(rank) if config.get("use_rslora") else alpha / rank)
