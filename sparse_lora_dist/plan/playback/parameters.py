"""What a rank holds of every parameter, before there is one: the loader's walk over a meta model.

Lengths count elements of ZeRO-3 parameters, in the engine's dtype: two or four packed bytes wear
one.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from sparse_lora_dist.base_model import nf4
from sparse_lora_dist.base_model.architecture import output_head
from sparse_lora_dist.base_model.nf4_shard import num_elements_for
from sparse_lora_dist.base_model.shard_loader import is_plain_linear
from sparse_lora_dist.methods.protocol.form import Site
from sparse_lora_dist.methods.protocol.method import Method

Kind = Literal["packed", "scales", "plain", "embeddings", "rest", "kept", "trained"]
"""plain: linears that stay in the engine's dtype, the output head among them; rest: norms, biases
and whatever else there is; kept: of adapters, what never trains; trained: the rest of them, and
modules trained in full."""


FILE_ITEMSIZE = 2
"""Bytes of a weight in the checkpoint: bf16 or fp16."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Saved:
    """How bitsandbytes quantised a checkpoint."""

    double_quant: bool
    skipped: tuple[str, ...]
    """Modules that it left as they were, by whole names, or ends of them after a dot."""

    @classmethod
    def of(cls, config: PreTrainedConfig) -> "Saved | None":
        """What config.json says of it; None where it holds floats."""
        said = getattr(config, "quantization_config", None)
        if said is None:
            return None
        return cls(
            double_quant=bool(said.get("bnb_4bit_use_double_quant", False)),
            skipped=tuple(said.get("llm_int8_skip_modules") or ()),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedParameter:
    """One ZeRO-3 parameter."""

    name: str
    module: str
    """Which fetches it; an adapted linear's tensors come with the linear's name and a dot."""
    kind: Kind
    numel: int
    in_file: int = 0
    """Weights of the checkpoint that it is made from."""
    file_bytes: int = 0
    """Of them there."""

    @property
    def sparse(self) -> bool:
        """Does the method decide on it? Modules trained in full have no statistics and live
        whole."""
        return self.kind == "trained" and self.module.endswith(".")

    def share(self, world_size: int) -> int:
        """Elements that a rank holds, the same on all: shares are rounded up."""
        return -(-self.numel // world_size)


def planned_parameters(
    model: PreTrainedModel,
    sites: Sequence[Site],
    method: Method,
    trained: Collection[str],
    *,
    quantize: bool,
    double_quant: bool,
    dtype: torch.dtype,
    saved: Saved | None = None,
) -> list[PlannedParameter]:
    """Every parameter that ``ShardLoader`` and ``inject`` would make, in the model's order.

    Args:
        saved: how the checkpoint is in 4 bits already; None where it holds floats.
    """
    skipped = saved.skipped if saved else ()
    double_quant = saved.double_quant if saved else double_quant
    found: list[PlannedParameter] = []
    seen: set[int] = set()
    chosen = {site.name: site for site in sites}
    head = output_head(model)
    for name, module in model.named_modules():
        if name in chosen:
            form = method.form(chosen[name])
            first = name == sites[0].name
            specs = [(k, s) for k, s in form.tensors.items() if first or not s.shared]
            found += [
                PlannedParameter(
                    name=f"{name}.{key}",
                    module=f"{name}.",
                    kind="trained",
                    numel=prod(spec.shape),
                )
                for key, spec in specs
            ]
            found += [
                PlannedParameter(
                    name=f"{name}.{key}",
                    module=f"{name}.",
                    kind="kept",
                    numel=num_elements_for(kept.num_bytes, dtype),
                )
                for key, kept in form.kept.items()
            ]
        for leaf, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen:  # tied
                continue
            seen.add(id(parameter))
            packs = quantize and name not in trained and _is_packed(module, leaf, name == head)
            if packs and not any(_is_under(name, outer) for outer in skipped):
                found += _packed(name, leaf, parameter, double_quant, dtype, saved is not None)
            else:
                kind = _kind(module, leaf, name in trained)
                found.append(_whole(name, leaf, parameter, kind))
    return found


def ties(model: PreTrainedModel) -> list[tuple[str, str]]:
    """(module, name of a parameter that it shares with a module before it)."""
    first: dict[int, str] = {}
    found = []
    for name, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            if id(parameter) in first:
                found.append((name, first[id(parameter)]))
            first.setdefault(id(parameter), f"{name}.{leaf}")
    return found


def _is_under(name: str, outer: str) -> bool:
    return f".{name}.".endswith(f".{outer}.") or name.startswith(f"{outer}.")


def _is_packed(module: nn.Module, leaf: str, is_head: bool) -> bool:
    """Weights of linears, and of experts, which lie in one tensor of three axes."""
    if is_plain_linear(module):
        return leaf == "weight" and not is_head
    parameter = module.get_parameter(leaf)
    return parameter.dim() == 3 and not isinstance(module, nn.Embedding)


def _packed(
    module: str, leaf: str, weight: Tensor, double_quant: bool, dtype: torch.dtype, saved: bool
) -> Iterator[PlannedParameter]:
    experts = weight.shape[0] if weight.dim() == 3 else 1
    rows, columns = weight.shape[-2:]
    layout = nf4.Layout(shape=(rows, columns), double_quant=double_quant)
    sizes: dict[Kind, int] = {"packed": layout.packed_bytes, "scales": layout.scale_bytes}
    for kind, size in sizes.items():
        coming = weight.numel() if kind == "packed" else 0
        yield PlannedParameter(
            name=f"{module}.{leaf}" if kind == "packed" else f"{module}.scales",
            module=module,
            kind=kind,
            numel=num_elements_for(experts * size, dtype),
            in_file=coming,
            file_bytes=experts * size if saved else FILE_ITEMSIZE * coming,
        )


def _whole(module: str, leaf: str, parameter: Tensor, kind: Kind) -> PlannedParameter:
    count = parameter.numel()
    return PlannedParameter(
        name=f"{module}.{leaf}",
        module=module,
        kind=kind,
        numel=count,
        in_file=count,
        file_bytes=FILE_ITEMSIZE * count,
    )


def _kind(module: nn.Module, leaf: str, trained: bool) -> Kind:
    if trained:
        return "trained"
    if isinstance(module, nn.Embedding):
        return "embeddings"
    return "plain" if leaf == "weight" and is_plain_linear(module) else "rest"


def shard_bytes(parameters: Sequence[PlannedParameter], world_size: int, itemsize: int) -> int:
    """Bytes that a rank holds of these, padding included."""
    return sum(p.share(world_size) for p in parameters) * itemsize
