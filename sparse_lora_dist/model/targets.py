"""Which modules train: linears that carry a delta, and those trained in full. PEFT's names."""

import re
from collections.abc import Collection, Iterable, Sequence

from torch import nn
from transformers import PreTrainedModel

from sparse_lora_dist.base_model.architecture import output_head
from sparse_lora_dist.base_model.shard_loader import is_plain_linear
from sparse_lora_dist.config.sections import AdapterConfig
from sparse_lora_dist.errors import UserError
from sparse_lora_dist.methods.protocol.form import Site
from sparse_lora_dist.tasks.class_head import Head, modules_inside


def find_sites(model: PreTrainedModel, adapter: AdapterConfig, full: Collection[str]) -> list[Site]:
    """The linears that carry a delta.

    ``target_modules`` may be ``"all-linear"``: every linear but the output head; any other string:
    a regular expression that must match the whole name; a sequence: names, each the whole of a
    module's name or its end after a dot. Modules trained in ``full`` never carry one.
    """
    wanted, head = adapter.target_modules, output_head(model)
    linears = {n: m for n, m in model.named_modules() if is_plain_linear(m) and n not in full}
    if wanted == "all-linear":
        chosen = [n for n in linears if n != head]
    elif isinstance(wanted, str):
        chosen = [n for n in linears if re.fullmatch(wanted, n)]
    else:
        chosen = [n for n in linears if any(is_called(n, w) for w in wanted)]
    names = () if isinstance(wanted, str) else wanted
    unused = [w for w in names if not any(is_called(n, w) for n in chosen)]
    if unused or not chosen:
        raise UserError(
            f"--target_modules: no linear is called {', '.join(unused) or wanted}. "
            f"This model has: {_endings(linears)}. Name some of these, or use all-linear."
        )
    sites = [
        Site(
            name=name,
            in_features=linears[name].in_features,
            out_features=linears[name].out_features,
            rank=adapter.rank,
        )
        for name in chosen
    ]
    _check_ranks(sites)
    return sites


def _check_ranks(sites: Sequence[Site]) -> None:
    """A rank above a matrix side buys nothing: the product cannot have it."""
    small = [s for s in sites if s.rank > min(s.in_features, s.out_features)]
    if small:
        first = small[0]
        raise UserError(
            f"--rank {first.rank} is larger than a side of {len(small)} target matrices, the first "
            f"is {first.name} ({first.out_features} x {first.in_features}). Lower --rank or leave "
            "these out of --target_modules."
        )


def find_full(model: PreTrainedModel, wanted: Sequence[str], head: Head) -> dict[str, nn.Module]:
    """Modules to train in full (``--modules_to_save``), by name, but those of the head, which do so
    unasked."""
    unasked = modules_inside(head.modules)
    modules = {n: m for n, m in model.named_modules() if n not in unasked}
    wanted = [w for w in wanted if not any(is_called(n, w) for n in unasked)]
    found = {n: m for n, m in modules.items() if any(is_called(n, w) for w in wanted)}
    problems = [f"nothing is called {w}" for w in wanted if not any(is_called(n, w) for n in found)]
    branches = [n for n, m in found.items() if next(m.children(), None) is not None]
    if branches:
        problems.append(f"{branches[0]} has modules inside; name those that hold parameters")
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    is_tied = model.config.tie_word_embeddings and ends[1] is not None
    if is_tied and any(m in ends for m in found.values()):
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
