"""Find a base model, check its config.json, and build its modules on the meta device."""

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
"""--task -> the transformers class that builds the model."""
PRECISIONS = {"bf16": torch.bfloat16, "fp32": torch.float32}
"""--precision -> dtype of the engine, and of the weights in forward."""
HUB_PATTERNS = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt", "*.py"]
"""Files of a hub repository that are downloaded."""
EXPERT_MODELS = ("mixtral", "qwen3_moe")
"""Values of model_type of the supported mixture-of-experts models."""
EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
"""Names of the number of experts in config.json, which differ between architectures."""
HUB_DUPLICATES = ["consolidated*", "original/*"]
"""Files of a hub repository that hold the same weights again, in the publisher's own layout."""


def resolve_folder(
    model: str, revision: str | None, *, patterns: Sequence[str] = HUB_PATTERNS
) -> Path:
    """Return the local folder of a model; download a hub model that is not in the hub cache.

    Args:
        model: path of a folder, or a hub id.
        revision: branch, tag or commit of a hub model; None for its default branch.
        patterns: files to download.

    Raises:
        UserError: ``model`` is no local folder and cannot be downloaded.
    """
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
        raise UserError(
            f"--model {model} is not a local folder, and it cannot be downloaded from the hub: "
            f"{error}. Give the path of a model folder, or a hub id that you have access to."
        ) from error
    return Path(folder)


def read_config(folder: Path, *, trust_remote_code: bool) -> PretrainedConfig:
    """Read config.json.

    Args:
        folder: the model folder.
        trust_remote_code: run code from the model folder.

    Raises:
        UserError: config.json is missing or invalid, the weights are quantised in a way that
            cannot be loaded, or the mixture-of-experts architecture is not supported.
    """
    if not (folder / "config.json").exists():
        raise UserError(
            f"--model {folder} has no config.json. Give a folder saved by save_pretrained."
        )
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(
            folder, trust_remote_code=trust_remote_code
        )
    except (ValueError, OSError, KeyError, StrictDataclassError) as error:
        raise UserError(f"--model {folder}: {error}") from error
    except (TypeError, AttributeError, ArithmeticError) as error:  # 0 heads, a string as a size
        raise UserError(
            f"--model {folder}: config.json does not describe a valid model: {error}. Check its "
            "sizes, or download the model again."
        ) from error
    _refuse_unsupported_weights(folder, config)
    return config


def _refuse_unsupported_weights(folder: Path, config: PretrainedConfig) -> None:
    quantized = dict(getattr(config, "quantization_config", None) or {})
    method = quantized.get("quant_method", "bitsandbytes")
    if method != "bitsandbytes" or quantized.get("load_in_8bit"):
        kind = "bitsandbytes in 8 bits" if method == "bitsandbytes" else method
        raise UserError(
            f"--model {folder} is already quantised ({kind}). Supported are bf16, fp16 and fp32 "
            "weights, which are quantised while loading, and weights that bitsandbytes saved in "
            "4 bits. Give the original weights."
        )
    experts = max((getattr(config, name, None) or 0 for name in EXPERT_COUNTS), default=0)
    if experts > 1 and config.model_type not in EXPERT_MODELS:
        raise UserError(
            f"--model {folder} is a mixture-of-experts model ({config.model_type}, {experts} "
            f"experts). Supported are {' and '.join(EXPERT_MODELS)}, and all models without "
            "experts. Choose one of these."
        )


def meta_model(
    config: PretrainedConfig,
    *,
    task: str,
    dtype: torch.dtype,
    attn_implementation: str | None,
    trust_remote_code: bool,
) -> PreTrainedModel:
    """Build the model with all parameters and buffers on the meta device.

    Dropout and router jitter of the base are set to 0 in ``config``.

    Args:
        config: from ``read_config``.
        task: "causal_lm" or "seq_cls".
        dtype: dtype of the parameters.
        attn_implementation: attention kernel of transformers; None for its default.
        trust_remote_code: run code from the model folder.

    Raises:
        UserError: the architecture has no model for the task, or cannot be built.
    """
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
        raise UserError(
            f"--model: config.json does not describe a valid model: {error}. Check its sizes, or "
            "download the model again."
        ) from error
    return model


def _check_task(config: PretrainedConfig, task: str) -> None:
    auto_class: Any = AUTO_CLASSES[task]
    own_code = getattr(config, "auto_map", None) or {}
    if type(config) not in auto_class._model_mapping and auto_class.__name__ not in own_code:
        raise UserError(
            f"--model: transformers has no {config.model_type} model for --task {task}. Choose "
            "another base model or task."
        )
    masked_lm: Any = AutoModelForMaskedLM
    has_masked_lm = type(config) in masked_lm._model_mapping
    has_decoder = config.is_encoder_decoder or getattr(config, "is_decoder", False)
    if task == "causal_lm" and has_masked_lm and not has_decoder:
        raise UserError(
            f"--model: {config.model_type} is an encoder with bidirectional attention, so it "
            "cannot be trained as a causal language model. Classify with it (--task seq_cls), or "
            "choose a decoder model."
        )


def _switch_off_noise(config: PretrainedConfig) -> None:
    """Set dropout and router jitter of the base to 0.

    They would draw from torch's global generator, which differs between ranks, and a frozen base
    needs no regularisation.
    """
    for part in {id(c): c for c in (config, config.get_text_config())}.values():
        for name, value in list(vars(part).items()):
            if ("drop" in name or "jitter" in name) and isinstance(value, float):
                setattr(part, name, 0.0)


def fill_buffers(model: PreTrainedModel, device: torch.device) -> None:
    """Compute the buffers of a meta model, such as rotary frequencies, on ``device``.

    transformers computes non-persistent buffers in ``_init_weights``. While all parameters are
    still on the meta device that call changes nothing else.
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
    """Return the name of the linear layer that makes the logits, which is never quantised; None if
    the model has none."""
    head = model.get_output_embeddings()
    return next((name for name, module in model.named_modules() if module is head), None)


def identity(folder: Path, files: CheckpointFiles) -> str:
    """Return the SHA-256 of config.json and of the name, size and header of each safetensors file.

    It does not cover the weights themselves; ``same_on_all_nodes.hash_of_samples`` samples those.
    """
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for file in sorted({entry.file for entry in files.entries.values()}):
        with file.open("rb") as stream:
            header = stream.read(int.from_bytes(stream.read(8), "little"))
        digest.update(json.dumps([file.name, file.stat().st_size]).encode() + header)
    return digest.hexdigest()
