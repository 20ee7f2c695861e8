"""Names of modules in the class that config.json names, where the model is built as another class.

transformers builds the language model alone for some vision-language checkpoints, such as
Qwen3.5's:

    config.json                Qwen3_5ForConditionalGeneration   model.language_model.layers.0...
    AutoModelForCausalLM       Qwen3_5ForCausalLM                model.layers.0...

Servers such as vLLM, and PEFT over the whole model, look for the names of the former. An adapter
with other names is refused there, or loads and does nothing.
"""

import copy
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import torch
import transformers
from transformers import PretrainedConfig, PreTrainedModel

from sparse_lora_dist.base_model.safetensors_reader import CheckpointFiles
from sparse_lora_dist.base_model.weight_map import Keys, find_keys
from sparse_lora_dist.config.sections import AdapterConfig


@dataclass(frozen=True, kw_only=True)
class SavedClass:
    """The class of transformers that config.json names, and its names of the model's modules."""

    name: str
    """Name of the class."""
    modules: Mapping[str, str]
    """Name of a module -> its name in the class, for those with weights whose name differs."""

    def named(self, name: str) -> str:
        """Return the name in the class of a module, or of a parameter of one.

        Args:
            name: name in the model that is trained.
        """
        return _renamed(name, self.modules)

    def ours_of(self, name: str) -> str:
        """Return the name in the model that is trained of a module, or of a parameter of one.

        Args:
            name: name in the class; any other is returned as it is.
        """
        return _renamed(name, self.ours)

    @cached_property
    def ours(self) -> dict[str, str]:
        """Name in the class -> name in the model that is trained."""
        return {theirs: ours for ours, theirs in self.modules.items()}

    def only(self, modules: Iterable[str]) -> "SavedClass":
        """Return the class with the names of some modules only."""
        found = {name: self.modules[name] for name in modules if name in self.modules}
        return SavedClass(name=self.name, modules=found)

    def as_json(self) -> dict[str, Any]:
        """Return a dict of JSON values, as a checkpoint holds it."""
        return asdict(self)


def _renamed(name: str, modules: Mapping[str, str]) -> str:
    module, _, last = name.rpartition(".")
    if name in modules:
        return modules[name]
    return f"{modules[module]}.{last}" if module in modules else name


def find_saved_class(
    module: PreTrainedModel, config: PretrainedConfig, files: CheckpointFiles, keys_of: Keys
) -> SavedClass | None:
    """Find the class that config.json names, if the model is built as another one. Not collective.

    Only classes that generate text are looked at: a class without a language-model head is not what
    a causal language model is used as.

    Args:
        module: the model on the meta device.
        config: configuration that config.json describes.
        files: the opened safetensors files of the base.
        keys_of: parameter name -> names of its tensors in the files.

    Returns:
        The class; None if the model is built as this class, or if it does not hold all weights of
        the model.
    """
    (name, *others) = [*(config.architectures or []), None]
    other = getattr(transformers, name, None) if isinstance(name, str) else None
    is_model = isinstance(other, type) and issubclass(other, PreTrainedModel)
    if other is None or not is_model or len(others) > 1 or name == type(module).__name__:
        return None
    try:
        with torch.device("meta"):
            whole = other(copy.deepcopy(config))
        if not whole.can_generate() or whole.get_output_embeddings() is None:
            return None
        theirs = {tuple(keys): n for n, keys in find_keys(whole, files).items()}
    except Exception:  # an architecture that transformers cannot build: it is not used
        return None
    names = dict(module.named_modules())
    modules: dict[str, str] = {}
    for parameter, keys in keys_of.items():
        if tuple(keys) not in theirs:
            return None
        ours, found = (n.rpartition(".")[0] for n in (parameter, theirs[tuple(keys)]))
        if ours in names and ours != found:
            modules[ours] = found
    return SavedClass(name=str(name), modules=modules)


def by_our_names(adapter: AdapterConfig, saved_class: SavedClass | None) -> AdapterConfig:
    """Return the options of the adapter with our names, where whole names of modules in the class
    of config.json are given."""
    if saved_class is None:
        return adapter
    targets, full = adapter.target_modules, adapter.modules_to_save
    if not isinstance(targets, str):
        targets = tuple(saved_class.ours.get(name, name) for name in targets)
    full = tuple(saved_class.ours.get(name, name) for name in full)
    return replace(adapter, target_modules=targets, modules_to_save=full)
