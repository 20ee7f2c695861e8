"""Name the tensors in the files of a base that the model of its config.json does not read.

A config.json of another model, such as one with fewer layers, would otherwise train another model
than the files hold, without a word.
"""

import re
from collections.abc import Collection, Iterable

from transformers import PretrainedConfig, PreTrainedModel

from sparse_lora_dist.base_model.safetensors_reader import CheckpointFiles
from sparse_lora_dist.base_model.weight_map import Keys, tensors_of
from sparse_lora_dist.distributed.console import counted

USUAL = re.compile(
    r"inv_freq$|att(n|ention)\.(masked_)?bias$|position_ids$|(^|\.)(mtp|vision|visual|image|audio|speech|"
    r"multi_?modal|mm_|projector|connector|talker|code2wav)"
)
"""Tensors that a text model leaves unread: buffers that transformers computes, layers that predict
several tokens, and the parts of a checkpoint for images and sound."""
NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
NEXT_LAYERS = "num_nextn_predict_layers"
"""Key of config.json for the number of layers, after the last one, that predict more tokens."""


def unread_tensors(
    model: PreTrainedModel, files: CheckpointFiles, keys_of: Keys, *, new_head: bool
) -> tuple[list[str], list[str]]:
    """Return the tensors of the files that nothing reads, without the usual ones.

    Args:
        model: the model on the meta device.
        files: the opened safetensors files of the base.
        keys_of: parameter name -> names of its tensors in the files.
        new_head: True for a classifier: what lies outside of the layers may be another head.

    Returns:
        Those of layers or experts beyond the number in config.json, and all others.
    """
    read = {key for keys in keys_of.values() for key in keys}
    unread = _without_usual(model, (key for key in tensors_of(files) if key not in read))
    numbered = {_shape_of_name(key) for key in read if NUMBER.search(key)}
    beyond = [key for key in unread if _shape_of_name(key) in numbered]
    others = [key for key in unread if key not in {*beyond}]
    beyond = _without_next_layers(model.config.get_text_config(), beyond)
    return beyond, [key for key in others if NUMBER.search(key)] if new_head else others


def in_words(beyond: Collection[str], others: Collection[str]) -> list[str]:
    """Return a sentence for each of the two lists of ``unread_tensors`` that is not empty."""
    said = []
    if beyond:
        said.append(
            f"the files hold {counted(len(beyond), 'tensor')} of more layers or experts than "
            f"config.json has, such as {next(iter(beyond))}. They are not read: a smaller model is "
            "used than the files hold. Use the config.json that belongs to these weights"
        )
    if others:
        said.append(
            f"the files hold {counted(len(others), 'tensor')} that the model of config.json does "
            f"not read, such as {next(iter(others))}"
        )
    return said


def _shape_of_name(key: str) -> str:
    return NUMBER.sub("*", key)


def _without_usual(model: PreTrainedModel, keys: Iterable[str]) -> list[str]:
    ignored = [re.compile(p) for p in model._keys_to_ignore_on_load_unexpected or ()]
    return [key for key in keys if not any(p.search(key) for p in (USUAL, *ignored))]


def _without_next_layers(config: PretrainedConfig, keys: list[str]) -> list[str]:
    """Leave out the layers after the last one that predict several tokens, if config.json has
    some."""
    more, layers = getattr(config, NEXT_LAYERS, None), getattr(config, "num_hidden_layers", None)
    if not (isinstance(more, int) and isinstance(layers, int)):
        return keys
    known = range(layers, layers + more)
    return [key for key in keys if not any(int(n) in known for n in NUMBER.findall(key)[:1])]
