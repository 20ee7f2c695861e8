"""Find the head of a classifier, and draw initial values for parameters that the base files lack.

The head turns the hidden states of the base into one logit per class. It trains in full, without an
adapter: it is small, and it is randomly initialised if the base was not trained as a classifier.
"""

import copy
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from sparse_lora_dist.adapter.peft_classes import ClassRows
from sparse_lora_dist.adapter.seeds import seed_of
from sparse_lora_dist.base_model.safetensors_reader import CheckpointFiles
from sparse_lora_dist.base_model.weight_map import Keys
from sparse_lora_dist.distributed.console import counted
from sparse_lora_dist.errors import UserError
from sparse_lora_dist.zero3.slices import Values

ONE_LABEL: Final = "single_label_classification"
"""Value of problem_type in config.json for classes of which each example has one."""


@dataclass(frozen=True, kw_only=True)
class Head:
    """A classifier's head. For a causal language model, whose head is frozen, it has no modules."""

    modules: Mapping[str, nn.Module] = field(default_factory=dict)
    """Name in the model -> module to train in full. A module may contain others."""
    new: tuple[str, ...] = ()
    """Names of the head's parameters that the base files lack. They start from random values."""

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return name in the model -> parameter, of the whole head."""
        return {
            f"{name}.{k}": p for name, m in self.modules.items() for k, p in m.named_parameters()
        }

    def rows(self, classes: Sequence[str]) -> ClassRows:
        """Return which of the head's parameters have a row for each class.

        Args:
            classes: names of the classes, in the order of the logits.
        """
        size = len(classes)
        rows = [name for name, p in self.parameters().items() if p.shape[:1] == (size,)]
        return ClassRows(names=classes, parameters=rows)

    def report(self, num_classes: int, given: Collection[str], source: str) -> str:
        """Return a line for the screen: which modules train, and where their values come from;
        "" without modules.

        Args:
            num_classes: number of classes.
            given: names of tensors whose values come neither from the base nor from random numbers.
            source: where these come from, in words.
        """
        if not self.modules:
            return ""
        new = dict.fromkeys(n.rpartition(".")[0] for n in self.new if n not in given)
        left = [name for name in self.parameters() if name not in {*given, *self.new}]
        values = [f"values of {source}"] if {*given} & {*self.parameters()} else []
        values += ["values of the base model"] if left and (values or not new) else []
        values += [f"randomly initialised: {', '.join(new)}"] if new else []
        count = counted(num_classes, "label")
        return f"{count}; {', '.join(self.modules)} trained in full; {', '.join(values)}"


def classes_of(architecture: PretrainedConfig) -> list[str]:
    """Return the class names of a transformers config, in the order of the head's logits."""
    return [str(name) for _, name in sorted((architecture.id2label or {}).items())]


def find_head(model: PreTrainedModel, files: CheckpointFiles, keys_of: Keys) -> Head:
    """Return the head of a classifier. Not a collective.

    The head consists of all modules of the model outside ``model.base_model``, and of poolers
    inside ``model.base_model`` that the files lack. BERT's head, for example, takes the output of a
    pooler, which the files of a masked language model do not contain.

    Args:
        model: transformers classifier; it may be on the meta device.
        files: safetensors files of the base.
        keys_of: parameter name -> names of its tensors in the files. It has no item for parameters
            that the files lack.

    Raises:
        UserError: the files contain a head for other classes than the data has.
    """
    modules = beside_base(model)
    poolers = [n for n, m in model.named_modules() if "pooler" in n and isinstance(m, nn.Linear)]
    absent = [n for n in poolers if f"{n}.weight" not in keys_of and n not in modules]
    inside = {n: model.get_submodule(n) for n in absent if not _is_inside(n, modules)}
    modules |= inside
    names = [*Head(modules=modules).parameters()]
    _check_classes(model, files, {n: keys_of[n][0] for n in names if n in keys_of})
    return Head(modules=modules, new=tuple(n for n in names if n not in keys_of))


def beside_base(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Return name -> module for the modules of a classifier outside ``model.base_model``.

    Modules without parameters, such as dropout, are left out.

    Args:
        model: transformers classifier; it may be on the meta device.
    """
    base = model.base_model
    assert base is not model, f"{type(model).__name__} has no base model apart from its head"
    return {name: m for name, m in model.named_children() if m is not base and _holds(m)}


def modules_inside(modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Return the given modules and all modules inside them, at any depth.

    Args:
        modules: whole name of a module in the model -> module.

    Returns:
        Whole name of a module in the model -> module.
    """
    return {
        f"{name}.{inner}".rstrip("."): module
        for name, outer in modules.items()
        for inner, module in outer.named_modules()
    }


def first_values(model: PreTrainedModel, names: Collection[str], seed: int) -> dict[str, Values]:
    """Return random initial values of parameters, as transformers' ``_init_weights`` draws them.

    Each rank draws the values of a whole module, with a seed made from the run's seed and the
    module's name, and then cuts its range. So they are the same on any number of ranks. Not a
    collective.

    Args:
        model: model that has the parameters; it may be on the meta device.
        names: names of the parameters that need values.
        seed: seed of the run.

    Returns:
        Parameter name -> function (start, stop) that returns elements [start, stop) of its
        flattened values, fp32, 1-D, on the CPU.
    """
    values: dict[str, Values] = {}
    for owner in dict.fromkeys(name.rpartition(".")[0] for name in names):
        module = copy.deepcopy(model.get_submodule(owner)).float().to_empty(device="cpu")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_of(seed, owner))
            model._init_weights(module)
        values |= {f"{owner}.{k}": _range_of(p.detach()) for k, p in module.named_parameters()}
    return {name: values[name] for name in names}


def _range_of(whole: Tensor) -> Values:
    return lambda start, stop: whole.flatten()[start:stop]


def _holds(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _is_inside(name: str, modules: Iterable[str]) -> bool:
    return any(name.startswith(f"{outer}.") for outer in modules)


def _check_classes(model: PreTrainedModel, files: CheckpointFiles, held: Mapping[str, str]) -> None:
    """Raise ``UserError`` if the files contain a head for other classes than the data has.

    Args:
        model: classifier whose config has the classes of the data.
        files: safetensors files of the base.
        held: name of a parameter of the head -> its name in the files. It has no item for
            parameters that the files lack.
    """
    wanted = classes_of(model.config)
    remedy = (
        "Use data with the model's labels, or a model without a head, so that a new head is "
        "initialised: AutoModel.from_pretrained(...).save_pretrained(...) saves such a model."
    )
    for name, key in held.items():
        shape = tuple(model.get_parameter(name).shape)
        found = files.entries[key].shape
        if found != shape and found[1:] == shape[1:]:
            raise UserError(
                f"The head of {files.folder} has {found[0]} classes ({name}), but --data has the "
                f"labels {', '.join(wanted)}. {remedy}"
            )
    config = json.loads((files.folder / "config.json").read_text())
    named = config.get("id2label") or {}
    known = [named[number] for number in sorted(named, key=int)]
    unnamed = [f"LABEL_{i}" for i in range(len(known))]
    if known not in ([], unnamed, wanted) and wanted != [str(i) for i in range(len(known))]:
        if held:
            raise UserError(
                f"The head of {files.folder} is for the classes {', '.join(known)}, but --data has "
                f"the labels {', '.join(wanted)}. {remedy}"
            )
