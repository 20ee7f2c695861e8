"""Find and open the files of the base, and check that they and the options go together."""

from pathlib import Path

from transformers import PretrainedConfig, PreTrainedModel

from sparse_lora_dist.base_model.architecture import (
    read_config,
    resolve_folder,
)
from sparse_lora_dist.base_model.safetensors_reader import CheckpointFiles, passed_over_in_words
from sparse_lora_dist.base_model.same_on_all_nodes import Fingerprint, check_same_on_all_nodes
from sparse_lora_dist.base_model.shard_loader import is_plain_linear
from sparse_lora_dist.base_model.weight_map import (
    is_quantized,
)
from sparse_lora_dist.config.paths import resolve_default
from sparse_lora_dist.config.sections import ModelConfig
from sparse_lora_dist.distributed.console import print_line
from sparse_lora_dist.distributed.phases import fail_together, first_on_its_node
from sparse_lora_dist.errors import UserError, as_user_error

DOWNLOAD = "Check the files of the model, or download it again."
"""What to do if a model cannot be opened, for messages."""


def open_files(
    options: ModelConfig, source: str
) -> tuple[Path, PretrainedConfig, CheckpointFiles, Fingerprint]:
    """Find the base's files, and download them if they are on the hub. Collective.

    Args:
        options: options of the model.
        source: what messages call the model.

    Returns:
        The folder, the content of its config.json, its weight files, and hashes of these.
    """
    if options.trust_remote_code:
        print_line(
            "warning", f"--trust_remote_code runs Python code that comes with {options.model}"
        )
    with fail_together("opening the base model"):
        with first_on_its_node():
            folder = resolve_folder(resolve_default("model", options.model), options.revision)
        with as_user_error(source, DOWNLOAD):
            architecture = read_config(folder, trust_remote_code=options.trust_remote_code)
            files = CheckpointFiles(folder)
    fingerprint = check_same_on_all_nodes(options.model, folder, files)
    if files.passed_over:
        print_line("note", passed_over_in_words(files))
    return folder, architecture, files, fingerprint


def check_checkpointing(options: ModelConfig, module: PreTrainedModel) -> None:
    """Raise ``UserError`` if the model does not support the --gradient_checkpointing given."""
    if options.gradient_checkpointing and not module.supports_gradient_checkpointing:
        raise UserError(
            f"{type(module).__name__} does not support --gradient_checkpointing. Leave the option "
            "out."
        )


def refuse_tied_linears(options: ModelConfig, module: PreTrainedModel) -> None:
    """Raise ``UserError`` if linears of a model share one weight, as Zamba2's blocks do, and are to
    be held in 4 bits."""
    names = {f"{n}.weight" for n, m in module.named_modules() if is_plain_linear(m)}
    shared: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if name in names:
            shared.setdefault(id(parameter), []).append(name)
    tied = next((names for names in shared.values() if len(names) > 1), None)
    if tied is not None and options.quantization != "none":
        raise UserError(
            f"In a {module.config.model_type} model, {tied[0]} and {tied[1]} are one weight, which "
            "cannot be held in 4 bits yet. Set --quantization none, or choose another --model."
        )


def check_quantization(
    options: ModelConfig, architecture: PretrainedConfig, files: CheckpointFiles
) -> None:
    """Raise ``UserError`` if the base files contradict config.json or --quantization.

    Either config.json says that the weights are quantised and they are not, or --quantization none
    is given for a quantised base.

    Args:
        options: options of the model.
        architecture: contents of config.json.
        files: safetensors files of the base.
    """
    said = getattr(architecture, "quantization_config", None) is not None
    if said and not is_quantized(files):
        raise UserError(
            f"{files.folder}/config.json says that the weights are already quantised by "
            "bitsandbytes, but the files hold no quantised weights. Remove quantization_config "
            "from config.json, or download the model again."
        )
    if is_quantized(files) and options.quantization == "none":
        raise UserError(
            f"--model {options.model} is already quantised to 4 bits, which --quantization none "
            "cannot undo. Use --quantization nf4, or give the model with the original weights."
        )
