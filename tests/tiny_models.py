"""Random model folders of odd sizes, as transformers saves them."""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

# Hardly any weight is a whole number of 64-element blocks, and no share of one is.
ODD_SIZES: dict[str, Any] = {
    "hidden_size": 60,
    "intermediate_size": 37,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "vocab_size": 101,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def save_llama(
    folder: Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    tied: bool = False,
    max_shard_size: str = "1GB",
    **sizes: Any,
) -> Path:
    """A Llama with random weights; ``max_shard_size`` spreads it over several files."""
    config = LlamaConfig(**(ODD_SIZES | sizes), tie_word_embeddings=tied)
    return _save(LlamaForCausalLM(config), folder, dtype, max_shard_size)


def save_qwen(folder: Path, *, dtype: torch.dtype = torch.bfloat16) -> Path:
    """A Qwen2, whose query, key and value linears have biases."""
    config = Qwen2Config(**ODD_SIZES, tie_word_embeddings=False)
    return _save(Qwen2ForCausalLM(config), folder, dtype, "1GB")


EVEN_SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 40,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"head_dim": 10, "sliding_window": 8},
    "qwen2": {},
    "qwen3": {"head_dim": 10},
    "gemma": {"head_dim": 10},
    "gemma2": {"head_dim": 10, "sliding_window": 8},
    "gemma3_text": {"head_dim": 10, "sliding_window": 8},
    "phi": EVEN_SIZES,
    "phi3": {"pad_token_id": 0},
    "gpt_neox": {"rotary_pct": 0.4},
    # Widths that torch's grouped matmul takes.
    "mixtral": EVEN_SIZES | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": EVEN_SIZES
    | {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
}
"""transformers' name of a family -> what its tiny model has besides the odd sizes."""


def save_family(
    folder: Path, family: str, *, dtype: torch.dtype = torch.bfloat16, **sizes: Any
) -> Path:
    """A model of transformers' ``family``, one of ``FAMILIES`` or another."""
    config = CONFIG_MAPPING[family](**(ODD_SIZES | FAMILIES.get(family, {}) | sizes))
    return _save(AutoModelForCausalLM.from_config(config), folder, dtype, "1GB")


def _save(model: PreTrainedModel, folder: Path, dtype: torch.dtype, max_shard_size: str) -> Path:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            # Biases start at zero and norms at one, which would hide a value that is never read.
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
    model.to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    return folder
