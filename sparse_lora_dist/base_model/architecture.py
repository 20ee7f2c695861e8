"""Which model: its folder, its identity, and its modules on the meta device, where nothing is
allocated."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
)

from sparse_lora_dist.base_model.safetensors_reader import CheckpointFiles
from sparse_lora_dist.errors import UserError

AUTO_CLASSES = {
    "causal_lm": AutoModelForCausalLM,
    "seq_cls": AutoModelForSequenceClassification,
}
PRECISIONS = {"bf16": torch.bfloat16, "fp32": torch.float32}
"""--precision -> what forward has weights in."""
HUB_PATTERNS = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt", "*.py"]
EXPERT_MODELS = ("mixtral", "qwen3_moe")
EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
HUB_DUPLICATES = ["consolidated*", "original/*"]  # the same weights in the maker's own layout


def resolve_folder(
    model: str, revision: str | None, *, patterns: Sequence[str] = HUB_PATTERNS
) -> Path:
    """The local folder of a model: itself, or what matches ``patterns`` of a hub model, downloaded
    if it is not in the cache."""
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(
            model,
            revision=revision,
            allow_patterns=list(patterns),
            ignore_patterns=HUB_DUPLICATES,
        )
    except Exception as error:  # the hub raises a dozen kinds, from no network to a gated model
        raise UserError(f"--model {model}: not a folder here, and the hub says: {error}") from error
    return Path(folder)


def read_config(folder: Path, *, trust_remote_code: bool) -> PretrainedConfig:
    """The architecture's config.json, refused where its weights are of a kind that is not read."""
    if not (folder / "config.json").exists():
        raise UserError(
            f"--model {folder} has no config.json; give a folder saved by transformers."
        )
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(
            folder, trust_remote_code=trust_remote_code
        )
    except (ValueError, OSError, KeyError, StrictDataclassError) as error:
        raise UserError(f"--model {folder}: {error}") from error
    except (TypeError, AttributeError, ArithmeticError) as error:  # 0 heads, words for numbers
        raise UserError(f"--model {folder}: config.json has sizes of no model: {error}") from error
    _refuse_what_is_not_read(folder, config)
    return config


def _refuse_what_is_not_read(folder: Path, config: PretrainedConfig) -> None:
    quantized = dict(getattr(config, "quantization_config", None) or {})
    method = quantized.get("quant_method", "bitsandbytes")
    if method != "bitsandbytes" or quantized.get("load_in_8bit"):
        what = "bitsandbytes in 8 bits" if method == "bitsandbytes" else method
        raise UserError(
            f"--model {folder} is already quantised ({what}). Read are bf16, fp16 and fp32 "
            "weights, which are quantised while loading, and what bitsandbytes saved in 4 bits. "
            "Give the original weights."
        )
    experts = max((getattr(config, name, None) or 0 for name in EXPERT_COUNTS), default=0)
    if experts > 1 and config.model_type not in EXPERT_MODELS:
        raise UserError(
            f"--model {folder} is a mixture of {experts} experts ({config.model_type}). Of these "
            f"models {' and '.join(EXPERT_MODELS)} are supported, and all without experts."
        )


def meta_model(
    config: PretrainedConfig,
    *,
    task: str,
    dtype: torch.dtype,
    attn_implementation: str | None,
    trust_remote_code: bool,
) -> PreTrainedModel:
    """The model of ``config`` for ``task``, every parameter and buffer on the meta device."""
    _check_task(config, task)
    _switch_off_noise(config)
    extra = {"attn_implementation": attn_implementation} if attn_implementation else {}
    try:
        with torch.device("meta"):
            model: PreTrainedModel = AUTO_CLASSES[task].from_config(
                config, dtype=dtype, trust_remote_code=trust_remote_code, **extra
            )
    except (ValueError, ImportError) as error:
        raise UserError(f"--model: {error}") from error
    except (RuntimeError, ArithmeticError) as error:
        raise UserError(f"--model: config.json has sizes of no model: {error}") from error
    return model


def _check_task(config: PretrainedConfig, task: str) -> None:
    auto_class: Any = AUTO_CLASSES[task]
    own_code = getattr(config, "auto_map", None) or {}
    if type(config) not in auto_class._model_mapping and auto_class.__name__ not in own_code:
        raise UserError(
            f"--model: transformers has no model for --task {task} of the kind "
            f"{config.model_type}. Choose another base model or task."
        )
    masked: Any = AutoModelForMaskedLM
    fills_gaps = type(config) in masked._model_mapping
    writes = config.is_encoder_decoder or getattr(config, "is_decoder", False)
    if task == "causal_lm" and fills_gaps and not writes:
        raise UserError(
            f"--model: {config.model_type} is an encoder, whose tokens see those after them, so it "
            "cannot learn to write. Label examples with it (--task seq_cls), or choose another."
        )


def _switch_off_noise(config: PretrainedConfig) -> None:
    """The base is frozen, so its own dropout and its router's jitter protect nothing; and they
    would draw from torch's generator, of which every rank has its own."""
    for part in {id(c): c for c in (config, config.get_text_config())}.values():
        for name, value in list(vars(part).items()):
            if ("drop" in name or "jitter" in name) and isinstance(value, float):
                setattr(part, name, 0.0)


def fill_buffers(model: PreTrainedModel, device: torch.device) -> None:
    """Compute the buffers of a meta model (rotary frequencies and the like) on ``device``.

    transformers fills non-persistent buffers in ``_init_weights``; with every parameter still on
    meta that call touches nothing else.
    """
    for module in model.modules():
        empty = {
            name: buffer for name, buffer in module.named_buffers(recurse=False) if buffer.is_meta
        }
        for name, buffer in empty.items():
            module._buffers[name] = torch.empty_like(buffer, device=device)
        if empty:
            model._init_weights(module)


def output_head(model: PreTrainedModel) -> str | None:
    """Name of the linear that makes the logits, which is never quantised; None where there is
    none."""
    head = model.get_output_embeddings()
    return next((name for name, module in model.named_modules() if module is head), None)


def identity(folder: Path, files: CheckpointFiles) -> str:
    """Hash of what makes this base: config.json, and name, size and header of every weights
    file."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for file in sorted({entry.file for entry in files.entries.values()}):
        with file.open("rb") as stream:
            header = stream.read(int.from_bytes(stream.read(8), "little"))
        digest.update(json.dumps([file.name, file.stat().st_size]).encode() + header)
    return digest.hexdigest()
