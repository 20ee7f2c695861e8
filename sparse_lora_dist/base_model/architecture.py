"""Find a base model, check its config.json, and build its modules on the meta device."""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.integrations import deepspeed as of_deepspeed

from sparse_lora_dist.base_model.safetensors_reader import CheckpointFiles
from sparse_lora_dist.errors import UserError, in_words
from sparse_lora_dist.system.small_files import parse_json, refuse_pipes_in, refuse_pointers_in

AUTO_CLASSES = {
    "causal_lm": AutoModelForCausalLM,
    "seq_cls": AutoModelForSequenceClassification,
}
"""transformers class that builds the model, by value of ``--task``."""
PRECISIONS = {"bf16": torch.bfloat16, "fp32": torch.float32}
"""dtype of the DeepSpeed engine and of the weights in forward, by value of ``--precision``."""
HUB_PATTERNS = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt", "*.py"]
"""Name patterns of the files of a hub repository that are downloaded."""
EXPERT_MODELS = ("mixtral", "qwen3_moe")
"""Values of model_type in config.json of the supported mixture-of-experts models."""
EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
"""Keys of config.json for the number of experts. Architectures use different ones."""
EXPERTS = re.compile(r"expert|moe|router", re.IGNORECASE)
"""What the names of modules of experts have."""
COUNTED = re.compile(r"(num|n)_\w*(layer|expert)s?|(en|de)coder_layers|n_layer|depth")
"""Keys of config.json for how many modules of a kind there are."""
MOST_MODULES = 10_000
"""Largest such number. Modules are built one by one, so 10^12 of them would never end."""
KERNELS = ("_attn_implementation", "attn_implementation")
"""Keys of config.json for the attention kernel."""
HUB_DUPLICATES = ["consolidated*", "original/*"]
"""Name patterns of files that hold the same weights again in the publisher's own layout. They are
not downloaded."""


def resolve_folder(
    model: str, revision: str | None, *, patterns: Sequence[str] = HUB_PATTERNS
) -> Path:
    """Return the local folder of a model. A hub model that is not in the hub cache is downloaded.

    Args:
        model: path of a folder, or a hub id.
        revision: branch, tag or commit of a hub model; None for its default branch.
        patterns: name patterns of the files to download.

    Raises:
        UserError: ``model`` is no local folder and cannot be downloaded, or it holds a pipe or
            a pointer of git LFS in place of a file.
    """
    if Path(model).is_dir():
        refuse_pipes_in(Path(model))
        refuse_pointers_in(Path(model))
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
            f"--model {model} is not a local folder, and it cannot be downloaded from the hub. "
            "Give the path of a model folder, or a hub id that you have access to. The hub reports "
            f"this error: {error}"
        ) from error
    return Path(folder)


OWN_CODE = (
    "comes with Python code of its own. If you have read that code and trust it, add "
    "--trust_remote_code true."
)
"""End of the message for a model folder whose code has to run."""


def read_config(folder: Path, *, trust_remote_code: bool) -> PretrainedConfig:
    """Return the transformers configuration that config.json of a model folder describes.

    Args:
        folder: the model folder.
        trust_remote_code: True to run the Python code of a model folder that has its own classes.

    Raises:
        UserError: config.json is missing or invalid, the weights are quantised in a way that
            cannot be loaded.
    """
    if not (folder / "config.json").exists():
        raise UserError(
            f"--model {folder} has no config.json. Give a folder that was saved by save_pretrained."
        )
    _check_content(folder)
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(
            folder, trust_remote_code=trust_remote_code
        )
    except (ValueError, OSError) as error:
        if "trust_remote_code" in str(error):
            raise UserError(f"--model {folder} {OWN_CODE}") from error
        raise UserError(
            f"transformers cannot read the config.json of --model {folder}. Check the file, or "
            f"download the model again. transformers reports: {error}"
        ) from error
    except Exception as error:  # 0 heads, a string as a size, a rope type of a newer version ...
        raise UserError(
            f"The config.json of --model {folder} does not describe a valid model. Check the sizes "
            "and names in it, or download the model again. transformers reports: "
            f"{in_words(error)}"
        ) from error
    _refuse_unsupported_weights(folder, config)
    return config


def read_content(folder: Path) -> dict[str, Any]:
    """Return the content of a model's config.json, as it is in the file.

    Args:
        folder: folder of the model.

    Raises:
        UserError: the file is not JSON, or not a JSON object.
    """
    file = folder / "config.json"
    try:
        content = parse_json(file.read_bytes())
    except ValueError as error:
        raise UserError(
            f"--model: {file} is not valid JSON: {error}. Repair the file or download it again."
        ) from error
    if not isinstance(content, dict):
        raise UserError(
            f"--model: {file} must be a JSON object, got a {type(content).__name__}. Repair the "
            "file or download it again."
        )
    return content


def _check_content(folder: Path) -> None:
    """Check what transformers would loop over, or download, without asking.

    Raises:
        UserError: config.json is no JSON object, has a number of layers or experts that no model
            has, or names a kernel of the hub.
    """
    file, content = folder / "config.json", read_content(folder)
    for part in (content, *(value for value in content.values() if isinstance(value, dict))):
        for key, value in part.items():
            if COUNTED.fullmatch(key) and type(value) in (int, float) and value > MOST_MODULES:
                raise UserError(
                    f"--model: {file} has {key} {value:.3g}, but at most {MOST_MODULES} are built. "
                    "Repair the file or download it again."
                )
            if key == "num_key_value_heads" and not _divides(value, part):
                raise UserError(
                    f"--model: {file} has {part['num_attention_heads']} attention heads and "
                    f"{value} heads of keys and values, which do not divide them. Repair the file "
                    "or download it again."
                )
            if key in KERNELS and "/" in str(value):
                raise UserError(
                    f"--model: {file} names the attention kernel {value!r}, which transformers "
                    "would download and run. Remove it from the file. If you trust it, name it by "
                    "--attn_implementation."
                )


def _divides(of_keys: object, part: Mapping[str, Any]) -> bool:
    heads = part.get("num_attention_heads")
    if type(of_keys) is not int or type(heads) is not int:
        return True  # transformers has a default, or a number for each layer
    return of_keys > 0 and heads % of_keys == 0


def _refuse_unsupported_weights(folder: Path, config: PretrainedConfig) -> None:
    if (folder / "adapter_config.json").exists():
        raise UserError(
            f"--model {folder} holds an adapter (adapter_config.json) beside the model, and "
            "transformers would load both. Move the adapter's two files into a folder of their "
            "own. To train on from it, give that folder to launcher/train.py --init_adapter."
        )
    quantized = getattr(config, "quantization_config", None)
    if quantized == {}:
        raise UserError(
            f"--model {folder} has an empty quantization_config in its config.json, with which "
            "transformers cannot load it either. Remove that key."
        )
    quantized = dict(quantized or {})
    before = "GPTQ or AWQ" if (folder / "quantize_config.json").exists() else "bitsandbytes"
    method = quantized.get("quant_method", before)
    if method != "bitsandbytes" or quantized.get("load_in_8bit"):
        kind = "bitsandbytes in 8 bits" if method == "bitsandbytes" else method
        raise UserError(
            f"--model {folder} is already quantised ({kind}), which is not supported. Supported "
            "are bf16, fp16 and fp32 weights, which are quantised while loading, and weights that "
            "bitsandbytes saved in 4 bits. Give the original weights."
        )


def refuse_experts(model: PreTrainedModel) -> None:
    """Raise ``UserError`` for a mixture of experts of an architecture that is not supported.

    The number of experts in config.json does not tell alone: it may be a default of a class whose
    layers are all dense, as in Doge and Nemotron-H. So the modules of the model are looked at.

    Args:
        model: model from ``meta_model``.
    """
    config = model.config
    experts = max((getattr(config, name, None) or 0 for name in EXPERT_COUNTS), default=0)
    if experts > 1 and config.model_type not in EXPERT_MODELS and (name := _first_experts(model)):
        raise UserError(
            f"--model {config.name_or_path} is a mixture of experts ({config.model_type}, "
            f"{experts} experts, the first in {name}). Supported are models of type "
            f"{' and '.join(EXPERT_MODELS)}, and all models without experts. Choose one of these."
        )


def _first_experts(model: PreTrainedModel) -> str | None:
    """Return the name of the first module that is called, or whose class is called, after experts
    or their router; None if there is none."""
    # Dense layers of Qwen2MoeForCausalLM are of the class Qwen2MoeMLP.
    family = re.sub(r"(For[A-Z]\w*|LMHeadModel|Model)$", "", type(model).__name__)
    for name, module in model.named_modules():
        kind = type(module).__name__.removeprefix(family)
        if name and EXPERTS.search(f"{name.rpartition('.')[2]} {kind}"):
            return str(name)
    return None


@contextmanager
def _without_zero3() -> Iterator[None]:
    """Context manager in which transformers builds whole models, also if the calling program has an
    ``HfDeepSpeedConfig`` alive, with which it would shard them."""
    before = of_deepspeed._hf_deepspeed_config_weak_ref
    of_deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        of_deepspeed._hf_deepspeed_config_weak_ref = before


def meta_model(
    config: PretrainedConfig,
    *,
    task: str,
    dtype: torch.dtype,
    attn_implementation: str | None,
    trust_remote_code: bool,
) -> PreTrainedModel:
    """Build the model with all parameters and buffers on the meta device.

    Args:
        config: configuration from ``read_config``. Dropout and router jitter are set to 0 in it.
        task: "causal_lm" or "seq_cls".
        dtype: dtype of the parameters.
        attn_implementation: attention implementation of transformers, such as "sdpa"; None for the
            default of transformers.
        trust_remote_code: True to run the Python code of a model folder that has its own classes.

    Returns:
        The transformers model for the task.

    Raises:
        UserError: the architecture has no model for the task, or cannot be built.
    """
    _check_task(config, task)
    _switch_off_noise(config)
    _forget_padding_beyond(config)
    config.return_dict = True  # models saved for torchscript return tuples
    extra = {"attn_implementation": attn_implementation} if attn_implementation else {}
    try:
        with torch.device("meta"), _without_zero3():
            model: PreTrainedModel = AUTO_CLASSES[task].from_config(
                config, dtype=dtype, trust_remote_code=trust_remote_code, **extra
            )
    except (ValueError, ImportError) as error:
        raise UserError(
            "transformers cannot build the model of --model. Check --attn_implementation and the "
            f"packages that the model needs. transformers reports: {error}"
        ) from error
    except Exception as error:  # sizes beyond what torch counts, an unknown activation ...
        raise UserError(
            "The config.json of --model does not describe a valid model. Check the sizes and names "
            f"in it, or download the model again. transformers reports: {in_words(error)}"
        ) from error
    return model


def _check_task(config: PretrainedConfig, task: str) -> None:
    if task == "causal_lm" and config.is_encoder_decoder and not _is_a_decoder_alone(config):
        classifiers: Any = AUTO_CLASSES["seq_cls"]
        has_classifier = type(config) in classifiers._model_mapping
        other = ", or train a classifier with launcher/train.py --task seq_cls"
        raise UserError(
            f"{config.model_type} is an encoder-decoder: its encoder reads the prompt and its "
            "decoder writes the answer, so this --model cannot be trained as a causal language "
            f"model. Choose a decoder model{other if has_classifier else ''}."
        )
    if isinstance(getattr(config, "type_vocab_sizes", None), list | tuple):
        raise UserError(
            f"{config.model_type} reads tables: each token has a row, a column and more "
            "(type_vocab_sizes in config.json), and --data gives texts alone. Choose a "
            "--model that reads texts."
        )
    auto_class: Any = AUTO_CLASSES[task]
    own_code = getattr(config, "auto_map", None) or {}
    if type(config) not in auto_class._model_mapping and auto_class.__name__ not in own_code:
        raise UserError(
            f"transformers has no {config.model_type} model for --task {task}. Choose another "
            "--model or another --task."
        )
    masked_lm: Any = AutoModelForMaskedLM
    has_masked_lm = type(config) in masked_lm._model_mapping
    has_decoder = config.is_encoder_decoder or getattr(config, "is_decoder", False)
    if task == "causal_lm" and has_masked_lm and not has_decoder:
        raise UserError(
            f"{config.model_type} is an encoder with bidirectional attention, so this --model "
            "cannot be trained as a causal language model. Train it as a classifier with "
            "launcher/train.py --task seq_cls, or choose a decoder model."
        )


def _is_a_decoder_alone(config: PretrainedConfig) -> bool:
    """Return True if config.json names the class of an encoder-decoder's decoder, or no class."""
    causal: Any = AUTO_CLASSES["causal_lm"]
    kind = causal._model_mapping.get(type(config), None)
    return kind is not None and kind.__name__ in (config.architectures or [kind.__name__])


def _switch_off_noise(config: PretrainedConfig) -> None:
    """Set dropout and router jitter of the base model to 0 in ``config``.

    Both would draw random numbers from torch's global generator, whose state differs between ranks.
    A frozen base needs no regularisation.
    """
    for part, name, _ in _noise(config):
        setattr(part, name, 0.0)


def _noise(config: PretrainedConfig) -> list[tuple[PretrainedConfig, str, float]]:
    """Return what draws random numbers in training: part of the config, name and value."""
    return [
        (part, name, value)
        for part in {id(c): c for c in (config, config.get_text_config())}.values()
        for name, value in vars(part).items()
        if ("drop" in name or "jitter" in name) and isinstance(value, float) and value
    ]


def left_out(config: PretrainedConfig) -> list[str]:
    """Return sentences about what config.json asks of training that a run leaves out.

    Args:
        config: configuration from ``read_config``, before ``meta_model``.
    """
    said = []
    if noise := [f"{name} {value:g}" for _, name, value in _noise(config)]:
        said.append(
            f"the base's own dropout is off ({', '.join(dict.fromkeys(noise))} in config.json): "
            "the base is frozen. --dropout sets that of the adapters"
        )
    weight = getattr(config, "router_aux_loss_coef", None)
    if getattr(config, "output_router_logits", False) and weight:
        said.append(
            f"the routers' load-balancing loss (router_aux_loss_coef {weight:g} in config.json) is "
            "left out: the routers are frozen"
        )
    return said


def _forget_padding_beyond(config: PretrainedConfig) -> None:
    """Set ``pad_token_id`` to None in ``config`` where it is no row of the embedding, which torch
    would refuse. Padding is never looked at, so any other token will do."""
    for part in {id(c): c for c in (config, config.get_text_config())}.values():
        pad, rows = getattr(part, "pad_token_id", None), getattr(part, "vocab_size", None)
        if isinstance(pad, int) and isinstance(rows, int) and not -rows <= pad < rows:
            part.pad_token_id = None


def output_head(model: PreTrainedModel) -> str | None:
    """Return the name of the linear layer that computes the logits, or None if there is none.

    The name is that of ``named_modules()``, such as "lm_head". The layer is never quantised.
    """
    head = model.get_output_embeddings()
    return next((name for name, module in model.named_modules() if module is head), None)


NO_CONTENT = ("_name_or_path", "transformers_version")
"""Keys of config.json that say nothing about the model."""


def hash_of_config(folder: Path) -> str:
    """Return a SHA-256 hash, in hex, of what config.json says about the model in ``folder``."""
    raw = (folder / "config.json").read_bytes()
    try:
        said = {k: v for k, v in json.loads(raw).items() if k not in NO_CONTENT}
        raw = json.dumps(said, sort_keys=True).encode()
    except (ValueError, AttributeError, RecursionError):
        pass  # no JSON object; whoever opens the model refuses it
    return hashlib.sha256(raw).hexdigest()


def identity(folder: Path, files: CheckpointFiles) -> str:
    """Return a SHA-256 hash, in hex, of config.json and the headers of the safetensors files.

    Of each safetensors file the hash covers the name, the size in bytes and the header, but not the
    weights. ``same_on_all_nodes.fingerprint`` hashes samples of the weights.

    Args:
        folder: the model folder.
        files: the opened safetensors files of the folder.
    """
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for file in sorted({entry.file for entry in files.entries.values()}):
        with file.open("rb") as stream:
            header = stream.read(int.from_bytes(stream.read(8), "little"))
        digest.update(json.dumps([file.name, file.stat().st_size]).encode() + header)
    return digest.hexdigest()
