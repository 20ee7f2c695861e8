"""The head of a classifier: which modules it is made of, and its values where the checkpoint has
none.

A head trains in full: it is small, and drawn anew where the base has learned something else so far.

Shapes: C classes, D features.
"""

import copy
import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from sparse_lora_dist.adapter.seeds import seed_of
from sparse_lora_dist.base_model.safetensors_reader import CheckpointFiles
from sparse_lora_dist.base_model.weight_map import Keys
from sparse_lora_dist.errors import UserError
from sparse_lora_dist.zero3.shares import Values


@dataclass(frozen=True, kw_only=True)
class Head:
    """What stands on the base model. A causal language model's is frozen, so it counts as none."""

    modules: Mapping[str, nn.Module] = field(default_factory=dict)
    """To train in full, by name; modules may lie inside."""
    new: tuple[str, ...] = ()
    """Parameters that the checkpoint lacks."""

    def report(self) -> str:
        """Where the values come from, in one line."""
        anew = dict.fromkeys(name.rpartition(".")[0] for name in self.new)
        values = f"drawn anew: {', '.join(anew)}" if anew else "values of the checkpoint"
        return f"{', '.join(self.modules)} trained in full; {values}"


def classes_of(architecture: PretrainedConfig) -> list[str]:
    """Names of the classes that a head of this config tells apart, in order."""
    return [str(name) for _, name in sorted((architecture.id2label or {}).items())]


def find_head(model: PreTrainedModel, files: CheckpointFiles, keys_of: Keys) -> Head:
    """All that a classifier has beside its base model, and poolers inside that the checkpoint
    lacks: BERT's is made for a head, and a masked language model has none.

    Raises:
        UserError: the checkpoint has a head, for other classes than the data.
    """
    modules = beside_base(model)
    poolers = [n for n, m in model.named_modules() if "pooler" in n and isinstance(m, nn.Linear)]
    absent = [n for n in poolers if f"{n}.weight" not in keys_of and n not in modules]
    inside = {n: model.get_submodule(n) for n in absent if not _is_inside(n, modules)}
    modules |= inside
    names = [f"{name}.{k}" for name, m in modules.items() for k, _ in m.named_parameters()]
    _check_classes(model, files, {n: keys_of[n][0] for n in names if n in keys_of})
    return Head(modules=modules, new=tuple(n for n in names if n not in keys_of))


def beside_base(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The modules with parameters that a classifier has beside its base model."""
    base = model.base_model
    assert base is not model, f"{type(model).__name__} keeps its base model nowhere"
    return {name: m for name, m in model.named_children() if m is not base and _holds(m)}


def modules_inside(modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """The modules, and all that lie in them, by their whole names."""
    return {
        f"{name}.{inner}".rstrip("."): module
        for name, outer in modules.items()
        for inner, module in outer.named_modules()
    }


def first_values(model: PreTrainedModel, names: Collection[str], seed: int) -> dict[str, Values]:
    """Values of these parameters as transformers' ``_init_weights`` draws them, fp32.

    From (seed, module's name), whole, and then cut: they are the same on any number of ranks.
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
    """A head that the checkpoint has must be one for the labels of the data. ``held``: name in the
    model -> in the files."""
    wanted = classes_of(model.config)
    remedy = (
        "Give data with the checkpoint's labels, or a checkpoint without a head, which is then "
        "drawn anew (AutoModel.from_pretrained(...).save_pretrained(...) leaves it out)."
    )
    for name, key in held.items():
        shape = tuple(model.get_parameter(name).shape)
        found = files.entries[key].shape
        if found != shape and found[1:] == shape[1:]:
            raise UserError(
                f"{files.folder}: its head has {found[0]} classes ({name}), but --data has the "
                f"labels {', '.join(wanted)}. {remedy}"
            )
    config = json.loads((files.folder / "config.json").read_text())
    named = config.get("id2label") or {}
    known = [named[number] for number in sorted(named, key=int)]
    unnamed = [f"LABEL_{i}" for i in range(len(known))]
    if known not in ([], unnamed, wanted) and wanted != [str(i) for i in range(len(known))]:
        if held:
            raise UserError(
                f"{files.folder}: its head knows the classes {', '.join(known)}, but --data has "
                f"the labels {', '.join(wanted)}. {remedy}"
            )
