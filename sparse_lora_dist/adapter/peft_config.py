"""What an adapter_config.json of PEFT's says of the adapter's kind and scales."""

from collections.abc import Mapping
from dataclasses import fields
from math import sqrt
from typing import Any

from peft import LoraConfig
from peft.utils.other import get_pattern_key

PREFIX = "base_model.model."
CONFIG = "adapter_config.json"
WEIGHTS, APART = "adapter_model.safetensors", "modules_to_save.safetensors"

MARKED = [f.name for f in fields(LoraConfig) if f.metadata.get("is_lora_variant")]
VARIANTS = (*MARKED, "use_qalora", "target_parameters")
"""What PEFT makes another kind of adapter of: DoRA, block-diagonal, routed ..."""


def other_kind(config: Mapping[str, Any]) -> str | None:
    """What it has that a LoRA whose update is B A has not."""
    if config.get("peft_type") != "LORA":
        return f"the type {config.get('peft_type')}"
    return next((name for name in VARIANTS if config.get(name)), None)


def scale_of(config: Mapping[str, Any], site: str, rank: int) -> float:
    """alpha / rank of one module, as PEFT has it: alpha_pattern names modules by the end of their
    names or by a regex, and rank-stabilised LoRA divides by the root."""
    alphas: dict[str, float] = config.get("alpha_pattern") or {}
    alpha: float = alphas.get(get_pattern_key(list(alphas), site), config["lora_alpha"])
    return float(alpha / sqrt(rank) if config.get("use_rslora") else alpha / rank)
