"""Find the modules that train: linears that get an adapter, and modules trained in full.

--target_modules and --modules_to_save mean the same as PEFT's ``target_modules`` and
``modules_to_save``.
"""

from collections.abc import Collection, Iterable, Sequence

from torch import nn
from transformers import PreTrainedModel

from sparse_lora_dist.base_model.architecture import output_head
from sparse_lora_dist.base_model.shard_loader import is_plain_linear
from sparse_lora_dist.config.sections import AdapterConfig
from sparse_lora_dist.errors import UserError
from sparse_lora_dist.methods.protocol.form import Site
from sparse_lora_dist.system.patterns import matching
from sparse_lora_dist.tasks.class_head import Head, modules_inside

NO_FIT = "--modules_to_save does not fit this model. "
"""Start of the message about wrong --modules_to_save."""


def find_sites(model: PreTrainedModel, adapter: AdapterConfig, full: Collection[str]) -> list[Site]:
    """Return the linears that get an adapter (called sites). Not a collective.

    Args:
        model: base model; it may be on the meta device.
        adapter: options of the adapter. ``target_modules`` is "all-linear" (every linear but the
            output head), another string (a regular expression that must match a whole name), or a
            sequence of names (each a whole name, or the part of one that follows a dot).
        full: names of modules that train in full, which get no adapter.

    Returns:
        Name, sizes and rank of each of these linears, in the model's order.

    Raises:
        UserError: a name matches no linear, or the rank is larger than in_features or out_features
            of a linear.
    """
    wanted, head = adapter.target_modules, output_head(model)
    linears = {n: m for n, m in model.named_modules() if is_plain_linear(m) and n not in full}
    if wanted == "all-linear":
        chosen = [n for n in linears if n != head]
    elif isinstance(wanted, str):
        chosen = matching("--target_modules", wanted, linears)
    else:
        chosen = [n for n in linears if any(is_called(n, w) for w in wanted)]
    names = () if isinstance(wanted, str) else wanted
    unused = [w for w in names if not any(is_called(n, w) for n in chosen)]
    if unused or not chosen:
        raise UserError(
            f"No linear of this model matches --target_modules {', '.join(unused) or wanted}. "
            f"Its linears are called {_endings(linears)}. Name some of these, or use all-linear."
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
    """Raise ``UserError`` if a linear's adapter rank is larger than in_features or out_features.

    The product of the adapter's A and B cannot have such a rank.
    """
    small = [s for s in sites if s.rank > min(s.in_features, s.out_features)]
    if small:
        first = small[0]
        raise UserError(
            f"--rank {first.rank} is larger than in_features or out_features of {len(small)} "
            f"target modules. The first is {first.name}, whose weight is {first.out_features} x "
            f"{first.in_features}. Lower --rank, or leave these modules out of --target_modules."
        )


def find_full(model: PreTrainedModel, wanted: Sequence[str], head: Head) -> dict[str, nn.Module]:
    """Return the modules that --modules_to_save names, without those of a classifier's head.

    The head of a classifier trains in full whether it is named or not. Not a collective.

    Args:
        model: base model; it may be on the meta device.
        wanted: the option's names, each the whole name of a module or the part that follows a dot.
        head: head of a classifier; without modules for a causal language model.

    Returns:
        Name -> module to train in full.

    Raises:
        UserError: a name matches no module, or it matches a module that cannot be trained in full
            because it contains modules, or is one of two tied embeddings.
    """
    unasked = modules_inside(head.modules)
    modules = {n: m for n, m in model.named_modules() if n not in unasked}
    wanted = [w for w in wanted if not any(is_called(n, w) for n in unasked)]
    found = {n: m for n, m in modules.items() if any(is_called(n, w) for w in wanted)}
    problems = [
        f"No module is called {w}." for w in wanted if not any(is_called(n, w) for n in found)
    ]
    branches = [n for n, m in found.items() if next(m.children(), None) is not None]
    if branches:
        problems.append(
            f"{branches[0]} only contains other modules. Name those in it that hold parameters."
        )
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    is_tied = model.config.tie_word_embeddings and ends[1] is not None
    if is_tied and any(m in ends for m in found.values()):
        problems.append(
            "The input and output embeddings of this model are tied, so they must stay frozen. "
            "Remove them from --modules_to_save."
        )
    if problems:
        holders = [n for n, m in modules.items() if next(m.parameters(False), None) is not None]
        raise UserError(
            f"{NO_FIT}{' '.join(problems)} Name only modules of the model: {_endings(holders)}."
        )
    return found


def is_called(name: str, ending: str) -> bool:
    """Return True if ``ending`` is a module's whole name, or the part of it that follows a dot.

    Args:
        name: whole name of a module, e.g. "model.layers.0.self_attn.q_proj".
        ending: name to compare, e.g. "q_proj" or "self_attn.q_proj".
    """
    return name == ending or name.endswith(f".{ending}")


def _endings(names: Iterable[str]) -> str:
    return ", ".join(sorted({name.rsplit(".", 1)[-1] for name in names}))
