"""Compare the adapter_config.json of a PEFT LoRA adapter with its tensors.

PEFT builds the adapter from the configuration and then fills in the tensors. One that the
configuration leaves out is dropped without an error, and one of another rank is refused.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from types import SimpleNamespace
from typing import Any

import peft
from peft import LoraConfig
from peft.utils.constants import SEQ_CLS_HEAD_NAMES
from torch import nn

from sparse_lora_dist.adapter.peft_config import CONFIG, PREFIX
from sparse_lora_dist.system.patterns import bad_regex, first_that_ends, matching

LAYER = re.compile(r".*?\.[^.]*\.(\d+)\.")
"""Beginning of a module's name up to the number of its layer, the first number in the name."""


def disagreements(
    config: Mapping[str, Any], ranks: Mapping[str, int], full: Iterable[str]
) -> list[str]:
    """Return how a plain LoRA adapter's configuration and its tensors disagree.

    Args:
        config: contents of adapter_config.json.
        ranks: name of a module, as in the adapter's files -> rank of its A.
        full: names of the other tensors, which are those of modules trained in full.

    Returns:
        One clause per disagreement, for a message; empty if there are none.

    Raises:
        UserError: a pattern takes too long to match.
    """
    if faults := _faults(config):
        return faults
    said = []
    applied = _targets(config, list(ranks))
    if left_out := [site for site in ranks if site not in applied]:
        said.append(
            f"it has tensors of {left_out[0]}{_more(left_out)}, but target_modules, "
            f"exclude_modules and layers_to_transform of {CONFIG} leave them out, and PEFT drops "
            "such tensors"
        )
    wanted = {site: _rank(config, site) for site in ranks}
    if other := [site for site, rank in ranks.items() if rank != wanted[site]]:
        said.append(
            f"its tensors of {other[0]}{_more(other)} have rank {ranks[other[0]]}, but {CONFIG} "
            f"says {wanted[other[0]]!r} (r, rank_pattern)"
        )
    if absent := _absent(config, list(full)):
        said.append(f"modules_to_save of {CONFIG} names {absent[0]}, but it has no tensor of that")
    return said


def without_tensors(
    config: Mapping[str, Any], linears: list[str], have: Collection[str]
) -> list[str]:
    """Return the linears of a base that an adapter's configuration names, but its files lack. PEFT
    warns of them and leaves the base's weights there.

    Args:
        config: contents of adapter_config.json.
        linears: names of all linears of the base.
        have: names of the linears and other modules that have tensors.
    """
    if str(config.get("target_modules") or "all-linear").lower() == "all-linear":
        return []  # PEFT chooses them by the architecture
    applied = _targets(config, linears)
    return [name for name in linears if name in applied and name not in have]


def ranks_of(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """Return the rank of each adapted module: the first size of its tensor "MODULE.lora_a".

    Args:
        shapes: name of a tensor, from ``open_peft`` -> its shape.
    """
    half = ".lora_a"
    return {n.removesuffix(half): s[0] for n, s in shapes.items() if n.endswith(half) and s}


def dropped_by_peft(module: nn.Module, sites: Iterable[str]) -> list[str]:
    """Return the last names of linears whose LoRA the installed PEFT does not apply. Of mixtures of
    experts whose files name experts one by one, it takes such a name for experts, in layers without
    experts and for shared experts too.

    Args:
        module: base model, of which only ``config`` is read.
        sites: names of the linears that get an adapter.
    """
    return sorted(
        last
        for last in {site.rpartition(".")[2] for site in sites}
        if not _peft_applies(module, last)
    )


def name_for_peft(name: str, task_type: str) -> str:
    """Return the name that stands for a module trained in full in PEFT's ``modules_to_save``.

    PEFT takes every module whose name ends with it. Over a classifier it looks in its own names
    too, which begin with ``PREFIX``: with the prefix, a name is whole. It adds
    ``SEQ_CLS_HEAD_NAMES`` by itself, without one.

    Args:
        name: whole name of the module in the model.
        task_type: PEFT's name of the task, e.g. "SEQ_CLS".
    """
    is_whole = task_type != "SEQ_CLS" or name in SEQ_CLS_HEAD_NAMES
    return name if is_whole else f"{PREFIX}{name}"


def taken_by_peft(module: nn.Module, full: Collection[str], task_type: str) -> list[str]:
    """Return the modules that PEFT takes to be trained in full, though they are not: their names
    end with the name of one that is. PEFT opens no adapter that lacks their tensors.

    Args:
        module: base model; it may be on the meta device.
        full: whole names of the modules that train in full.
        task_type: PEFT's name of the task.
    """
    ends = tuple(name_for_peft(name, task_type) for name in full)
    inside = tuple(f"{name}." for name in full)
    return [
        name
        for name, _ in module.named_modules()
        if ends and f"{PREFIX}{name}".endswith(ends) and name not in full
        if not name.startswith(inside)
    ]


def _peft_applies(module: nn.Module, last: str) -> bool:
    try:
        from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
    except ImportError:  # an older PEFT, which renames nothing
        return True
    asked = LoraConfig(target_modules=[last])
    try:
        convert_peft_config_for_transformers(asked, SimpleNamespace(config=module.config), None)  # type: ignore[arg-type]
    except ValueError:  # one of two names that PEFT joins
        return False
    return last in (asked.target_modules or ())


def not_applied(names: Collection[str]) -> str:
    """Return a sentence about what ``dropped_by_peft`` found."""
    return (
        f"PEFT {peft.__version__} does not apply a LoRA on {', '.join(names)} over this "
        "architecture, whose experts have the same names: it drops those tensors with a warning, "
        "and computes other outputs than the run"
    )


def _faults(config: Mapping[str, Any]) -> list[str]:
    """Return what is wrong with the values that are read here, as clauses for a message."""
    ranks = config.get("rank_pattern") or {}
    if not isinstance(ranks, dict):
        return [f"rank_pattern of {CONFIG} must map names to ranks, got {ranks!r}"]
    faults = [fault for key in ranks for fault in bad_regex("rank_pattern", key)]
    for name in ("target_modules", "exclude_modules", "modules_to_save", "layers_pattern"):
        value = config.get(name)
        if isinstance(value, str):
            faults += bad_regex(name, value)
        elif value is not None and not _is_list_of(value, str):
            faults.append(f"{name} of {CONFIG} must be names or a pattern, got {value!r}")
    layers = config.get("layers_to_transform")
    if layers is not None and type(layers) is not int and not _is_list_of(layers, int):
        faults.append(f"layers_to_transform of {CONFIG} must be whole numbers, got {layers!r}")
    patterns = config.get("layers_pattern")
    return faults + [f for p in _listed(patterns) for f in bad_regex("layers_pattern", p)]


def _is_list_of(value: object, kind: type) -> bool:
    return isinstance(value, list) and all(type(item) is kind for item in value)


def _listed(value: Any) -> list[Any]:
    return [] if value is None else value if isinstance(value, list) else [value]


def _targets(config: Mapping[str, Any], sites: list[str]) -> set[str]:
    """Return the modules to which PEFT applies the adapter, of those that have tensors."""
    wanted, excluded = config.get("target_modules"), config.get("exclude_modules")
    if wanted is None or str(wanted).lower() == "all-linear":
        found = {*sites}  # PEFT chooses them by the architecture
    else:
        found = {*_named("target_modules", wanted, sites)}
        layers = _listed(config.get("layers_to_transform"))
        if layers and not isinstance(wanted, str):
            whole = found & {*wanted}  # a full name counts whatever its layer is
            found = whole | {*_in_layers(layers, config.get("layers_pattern"), found)}
    return found - {*_named("exclude_modules", excluded or [], sites)}


def _named(option: str, value: str | list[str], sites: Iterable[str]) -> list[str]:
    if isinstance(value, str):
        return matching(option, value, sites)
    names, ends = {*value}, tuple(f".{name}" for name in value)
    return [site for site in sites if site in names or site.endswith(ends)]


def _in_layers(layers: list[int], patterns: Any, sites: Iterable[str]) -> Iterable[str]:
    if not patterns:
        numbers = {site: LAYER.match(site) for site in sites}
        return [site for site, found in numbers.items() if found and int(found[1]) in layers]
    one = "|".join(f"(?:{pattern})" for pattern in _listed(patterns))
    layer = "|".join(map(str, layers))
    return matching("layers_pattern", rf"(?:.*?\.)?(?:{one})\.(?:{layer})\..*", sites)


def _rank(config: Mapping[str, Any], site: str) -> Any:
    own = config.get("rank_pattern") or {}
    key = first_that_ends("rank_pattern", list(own), site)
    return config.get("r", LoraConfig.r) if key is None else own[key]


def _absent(config: Mapping[str, Any], full: list[str]) -> list[str]:
    """Return the names in ``modules_to_save`` that have no tensor. PEFT adds all usual names of a
    classifier's head by itself, of which a model has one."""
    names = _listed(config.get("modules_to_save"))
    tensors = [f".{PREFIX}{tensor}" for tensor in full]
    absent = [name for name in names if not any(f".{name}." in tensor for tensor in tensors)]
    has_head = any(name in SEQ_CLS_HEAD_NAMES for name in {*names} - {*absent})
    return [name for name in absent if not (has_head and name in SEQ_CLS_HEAD_NAMES)]


def _more(names: list[str]) -> str:
    return f" and {len(names) - 1} more modules" if len(names) > 1 else ""
