"""Which modules train: linears that carry a delta, and those trained in full. PEFT's names."""

import re
from collections.abc import Iterable, Sequence

from torch import nn
from transformers import PreTrainedModel

from sparse_lora_dist.base_model.architecture import output_head
from sparse_lora_dist.base_model.shard_loader import is_plain_linear
from sparse_lora_dist.errors import UserError


def find_sites(
    model: PreTrainedModel, target_modules: str | Sequence[str], full: Iterable[str]
) -> list[str]:
    """Names of the linears that carry a delta.

    ``"all-linear"``: every linear but the output head. Any other string: a regular expression that
    must match the whole name. A sequence: names, each the whole of a module's name or its end after
    a dot. Modules trained in ``full`` never carry one.
    """
    linears = [n for n, m in model.named_modules() if is_plain_linear(m) and n not in set(full)]
    if target_modules == "all-linear":
        chosen = [n for n in linears if n != output_head(model)]
    elif isinstance(target_modules, str):
        chosen = [n for n in linears if re.fullmatch(target_modules, n)]
    else:
        chosen = [n for n in linears if any(is_called(n, t) for t in target_modules)]
    asked = [target_modules] if isinstance(target_modules, str) else list(target_modules)
    unused = [t for t in asked if not any(is_called(n, t) for n in chosen)]
    if not chosen or (unused and not isinstance(target_modules, str)):
        raise UserError(
            f"--target_modules: no linear is called {', '.join(unused)}. "
            f"This model has: {_endings(linears)}. Name some of these, or use all-linear."
        )
    return chosen


def check_ranks(model: nn.Module, names: Sequence[str], rank: int) -> None:
    """A rank above a matrix side buys nothing: the product cannot have it."""
    small = []
    for name in names:
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        if rank > min(linear.in_features, linear.out_features):
            small.append(f"{name} ({linear.out_features} x {linear.in_features})")
    if small:
        raise UserError(
            f"--rank {rank} is larger than a side of {len(small)} target matrices, "
            f"the first is {small[0]}. Lower --rank or leave these out of --target_modules."
        )


def find_full(model: PreTrainedModel, wanted: Sequence[str]) -> dict[str, nn.Module]:
    """Modules to train in full (``--modules_to_save``), by name."""
    modules = dict(model.named_modules())
    found = {n: m for n, m in modules.items() if any(is_called(n, w) for w in wanted)}
    problems = [f"nothing is called {w}" for w in wanted if not any(is_called(n, w) for n in found)]
    branches = [n for n, m in found.items() if next(m.children(), None) is not None]
    if branches:
        problems.append(f"{branches[0]} has modules inside; name those that hold parameters")
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    if model.config.tie_word_embeddings and any(m in ends for m in found.values()):
        problems.append("input and output embeddings of this model are tied and stay frozen")
    if problems:
        holders = [n for n, m in modules.items() if next(m.parameters(False), None) is not None]
        raise UserError(
            f"--modules_to_save: {'; '.join(problems)}. This model has: {_endings(holders)}."
        )
    return found


def is_called(name: str, ending: str) -> bool:
    """Is ``ending`` the whole of a module's name, or what follows a dot in it?"""
    return name == ending or name.endswith(f".{ending}")


def _endings(names: Iterable[str]) -> str:
    return ", ".join(sorted({name.rsplit(".", 1)[-1] for name in names}))
