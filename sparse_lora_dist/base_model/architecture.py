"""Which model: its folder, its identity, and its modules on the meta device, where nothing is
allocated."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from sparse_lora_dist.base_model.checkpoint_files import CheckpointFiles
from sparse_lora_dist.errors import UserError

HUB_PATTERNS = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt", "*.py"]
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
    """The architecture's config.json, refused where the weights are already quantised."""
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
    method = getattr(config, "quantization_config", None)
    if method is not None:
        raise UserError(
            f"--model {folder} is already quantised ({dict(method).get('quant_method')}). "
            "Give the original bf16, fp16 or fp32 weights; they are quantised to NF4 while loading."
        )
    return config


def meta_model(
    config: PretrainedConfig,
    *,
    dtype: torch.dtype,
    attn_implementation: str | None,
    trust_remote_code: bool,
) -> PreTrainedModel:
    """The causal language model of ``config``, every parameter and buffer on the meta device."""
    extra = {"attn_implementation": attn_implementation} if attn_implementation else {}
    try:
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                config, dtype=dtype, trust_remote_code=trust_remote_code, **extra
            )
    except (ValueError, ImportError) as error:
        raise UserError(f"--model: {error}") from error
    return model


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
