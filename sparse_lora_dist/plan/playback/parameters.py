"""Sizes of all ZeRO-3 parameters of a run, listed from a model on the meta device.

Sizes are elements in the engine's dtype; packed bytes are stored as such elements, two bytes in one
element of a 16-bit dtype and four in one of fp32.
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
"""What a parameter is.

packed and scales: 4-bit weights and their block scales; plain: linears that are not quantised, such
as the output head; rest: norms, biases and others; kept: tensors of adapters that never train;
trained: tensors of adapters that train, and modules trained in full.
"""


FILE_ITEMSIZE = 2
"""Bytes per weight in base files that hold floats: bf16 or fp16."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SavedQuantization:
    """How bitsandbytes quantised the base files."""

    double_quant: bool
    """Are block scales quantised to 8 bits?"""
    skipped: tuple[str, ...]
    """Modules that are not quantised, by their names or by the ends of their names after a dot."""

    @classmethod
    def of(cls, config: PreTrainedConfig) -> "SavedQuantization | None":
        """Read it from config.json; None if the base files hold floats."""
        found = getattr(config, "quantization_config", None)
        if found is None:
            return None
        return cls(
            double_quant=bool(found.get("bnb_4bit_use_double_quant", False)),
            skipped=tuple(found.get("llm_int8_skip_modules") or ()),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedParameter:
    """One ZeRO-3 parameter."""

    name: str
    module: str
    """Module that gathers it; for an adapter's tensors, the name of its linear and a dot."""
    kind: Kind
    numel: int
    """Elements of the whole parameter, in the engine's dtype."""
    in_file: int = 0
    """Number of weights in the base files that it is made from."""
    file_bytes: int = 0
    """Bytes of these weights in the base files."""

    @property
    def sparse(self) -> bool:
        """Does the method decide on it? It does not on modules trained in full: all their entries
        are live, and they have no statistics."""
        return self.kind == "trained" and self.module.endswith(".")

    def share(self, world_size: int) -> int:
        """Elements of a rank's shard: the same on all ranks, rounded up."""
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
    saved: SavedQuantization | None = None,
) -> list[PlannedParameter]:
    """List every parameter that ``ShardLoader`` and ``inject`` would make, in the model's order.

    Args:
        model: a model on the meta device.
        sites: linears that carry adapters.
        method: the method, which gives the form of each adapter.
        trained: names of modules trained in full.
        quantize: whether linears are quantised to 4 bits.
        double_quant: whether block scales are quantised to 8 bits, if the run quantises.
        dtype: the engine's dtype.
        saved: how the base files are quantised already; None if they hold floats.
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
    """Tied parameters: (module, name of the parameter of an earlier module that it shares)."""
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
    """Are weights of this kind quantised? Those of linears and (one 3-D tensor) of experts are."""
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
    """Bytes of one rank's shards of ``parameters``, padding included.

    Args:
        itemsize: bytes per element of the engine's dtype.
    """
    return sum(p.share(world_size) for p in parameters) * itemsize
