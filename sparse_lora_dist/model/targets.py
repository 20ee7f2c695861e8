"""Find the modules that train: linears that get an adapter, and modules trained in full.

--target_modules and --modules_to_save mean the same as PEFT's ``target_modules`` and
``modules_to_save``.
"""

from collections.abc import Collection, Iterable, Sequence

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from sparse_lora_dist.base_model.architecture import output_head
from sparse_lora_dist.base_model.safetensors_reader import CheckpointFiles
from sparse_lora_dist.base_model.shard_loader import is_experts, is_plain_linear
from sparse_lora_dist.base_model.weight_map import Packed, Sources
from sparse_lora_dist.config.sections import AdapterConfig
from sparse_lora_dist.distributed.console import counted
from sparse_lora_dist.errors import UserError
from sparse_lora_dist.methods.protocol.form import Site
from sparse_lora_dist.model.look import Look
from sparse_lora_dist.system.own_files import ascii_name
from sparse_lora_dist.system.patterns import matching
from sparse_lora_dist.tasks.class_head import Head, modules_inside

READ = "the model uses their weight without calling them"
"""Why linears of ``Look.read`` are left as they are, for messages."""
TIED = "The input and output embeddings of this model are tied"
NO_FIT = "--modules_to_save does not fit this model. "
"""Start of the message about wrong --modules_to_save."""


def find_sites(
    model: PreTrainedModel,
    adapter: AdapterConfig,
    full: Collection[str],
    look: Look = Look(),  # noqa: B008 (it is frozen)
) -> tuple[list[Site], list[str]]:
    """Return the linears that get an adapter (called sites), and what to tell. Not a collective.

    Args:
        model: base model; it may be on the meta device.
        adapter: options of the adapter. ``target_modules`` is "all-linear" (every linear but the
            output head), another string (a regular expression that must match a whole name), or a
            sequence of names (each a whole name, or the part of one that follows a dot).
        full: names of modules that train in full, which get no adapter.
        look: what is known of the model. Linears that a text does not run, and those whose weight
            the model uses without calling them, get no adapter.

    Returns:
        Name, sizes and rank of each of these linears, in the model's order; and sentences about
        those that get none.

    Raises:
        UserError: a name matches no linear, or only linears that can get no adapter, or the rank is
            larger than in_features or out_features of a linear.
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
    if in_full := [w for w in unused if any(is_called(n, w) for n in full)]:
        raise UserError(
            f"{', '.join(in_full)}: a module that trains in full gets no adapter. Name it in "
            "--target_modules or in --modules_to_save, not in both."
        )
    if unused or not chosen:
        raise UserError(_no_match(model, ", ".join(unused) or str(wanted), linears))
    matched, chosen = chosen, [n for n in chosen if n not in look.unrun | look.read]
    unused = [w for w in names if not any(is_called(n, w) for n in chosen)]
    if unused or not chosen:
        reasons = _left_out(look, matched, "get no adapter")
        raise UserError(
            f"--target_modules {', '.join(unused) or wanted} names only linears that can get no "
            f"adapter: {'; '.join(reasons)}. Name others, or use all-linear."
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
    return sites, _left_out(look, matched, "get no adapter")


def _left_out(look: Look, matched: Sequence[str], what: str) -> list[str]:
    """Return a sentence about each kind of linear that gets no adapter, of those that match."""
    unrun, read = ([n for n in matched if n in some] for some in (look.unrun, look.read))
    told = [(unrun, "because a text does not run them"), (read, f"because {READ}")]
    return [f"{in_short(names)} {what}, {why}" for names, why in told if names]


def in_short(names: Sequence[str]) -> str:
    """Return the number of some linears and the name of the first: "14 linears (a.b, ...)"."""
    more = ", ..." if len(names) > 1 else ""
    return f"{counted(len(names), 'linear')} ({names[0]}{more})"


def _no_match(model: PreTrainedModel, wanted: str, linears: Iterable[str]) -> str:
    """Return the message that --target_modules matches no linear, and why if it is known."""
    head = output_head(model)
    if usable := [name for name in linears if name != head]:
        return (
            f"No linear of this model matches --target_modules {ascii_name(wanted)}. Its linears "
            "are called "
            f"{_endings(usable)}. Name some of these, or use all-linear."
        )
    others = {type(m).__name__ for m in model.modules() if isinstance(m, (nn.Linear, Conv1D))}
    others -= {"Linear"}
    made_of = f" but {', '.join(sorted(others))}" if others else ""
    return (
        f"A {model.config.model_type} model cannot be trained here: its layers have no nn.Linear"
        f"{made_of}. Only nn.Linear itself can be held in 4 bits and get an adapter. Choose "
        "another --model."
    )


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
    empty = [n for n, m in found.items() if not any(True for _ in m.parameters())]
    if empty:
        problems.append(f"{empty[0]} holds no parameters, so there is nothing to train in it.")
    branches = [n for n, m in found.items() if next(m.children(), None) is not None]
    if branches:
        own = any(map(is_experts, found[branches[0]].modules()))
        problems.append(
            f"{branches[0]} holds experts, which can neither be trained in full nor get an adapter."
            if own
            else f"{branches[0]} contains other modules, and only modules without any are trained "
            "in full. Name those in it that hold parameters."
        )
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    is_tied = getattr(model.config, "tie_word_embeddings", False) and ends[1] is not None
    if is_tied and any(m in ends for m in found.values()):
        problems.append(f"{TIED}, so they must stay frozen. Remove them from --modules_to_save.")
    if problems:
        holders = [
            name
            for name, module in modules.items()
            if next(module.parameters(False), None) is not None
            and next(module.children(), None) is None
        ]
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


def refuse_packed(files: CheckpointFiles, sources: Sources, look: Look) -> None:
    """Raise ``UserError`` if the files hold a weight in 4 bits that must be there as it is."""
    packed = [n for n in sorted(look.read) if isinstance(sources.get(f"{n}.weight"), Packed)]
    if packed:
        raise UserError(
            f"{files.folder} holds {in_short(packed)} in 4 bits, but {READ}. Give a --model with "
            "the original weights."
        )
