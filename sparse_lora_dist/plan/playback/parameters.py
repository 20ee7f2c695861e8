"""Lists all ZeRO-3 parameters of a run with their sizes, from a model on the meta device.

Sizes are numbers of elements of the dtype that DeepSpeed holds all parameters in (bf16, fp16 or
fp32, from ``--precision``). Packed 4-bit weights are stored in such elements too: two bytes in one
element of a 16-bit dtype, four bytes in one of fp32.
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
"""Kind of a parameter.

- packed: 4-bit weights.
- scales: scales of 4-bit weights, one for each block of consecutive weights.
- plain: weights of linears that are not quantised, such as the output head.
- embeddings: weights of embeddings.
- rest: norms, biases and others.
- kept: adapter tensors that the method writes and no gradient trains, such as masks and indices.
- trained: adapter tensors that train, and parameters of modules trained in full.
"""


FILE_ITEMSIZE = 2
"""Bytes per weight in base files that hold floats, if config.json does not say: bf16 or fp16."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SavedQuantization:
    """Quantisation of base files (the model's safetensors files) that bitsandbytes has quantised to
    4 bits."""

    double_quant: bool
    """True if block scales are quantised to 8 bits."""
    skipped: tuple[str, ...]
    """Modules that are not quantised: full names, or last parts of names such as "lm_head"."""

    @classmethod
    def of(cls, config: PreTrainedConfig) -> "SavedQuantization | None":
        """Return the quantisation that a model's config names, None if base files hold floats."""
        found = getattr(config, "quantization_config", None)
        if found is None:
            return None
        return cls(
            double_quant=bool(found.get("bnb_4bit_use_double_quant", False)),
            skipped=tuple(found.get("llm_int8_skip_modules") or ()),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedParameter:
    """One ZeRO-3 parameter with its sizes."""

    name: str
    """Name of the module and of the tensor in it, such as "model.norm.weight"."""
    module: str
    """Name of the module that gathers the parameter. For a tensor of an adapter, it is the name of
    the adapter's linear with a dot at the end, such as "model.layers.0.self_attn.q_proj."."""
    kind: Kind
    """What the parameter holds."""
    numel: int
    """Number of elements of the whole parameter, all ranks together without padding."""
    in_file: int = 0
    """Number of weights in the base files that the parameter is read from. 0 for adapters, and for
    block scales, so that a quantised weight is counted once."""
    file_bytes: int = 0
    """Bytes in the base files that the parameter is read from; 0 if it is not read from them."""

    @property
    def sparse(self) -> bool:
        """True for a trained tensor of an adapter, whose live entries the method decides. False for
        modules trained in full: all their entries are live, and they have no statistics."""
        return self.kind == "trained" and self.module.endswith(".")

    def share(self, world_size: int) -> int:
        """Return the number of elements of one rank's shard if ``world_size`` ranks share the
        parameter. It is rounded up, so that it is the same on all ranks."""
        return -(-self.numel // world_size)


def planned_parameters(
    model: PreTrainedModel,
    sites: Sequence[Site],
    method: Method,
    trained: Collection[str],
    whole: Collection[str] = (),
    *,
    quantize: bool,
    double_quant: bool,
    dtype: torch.dtype,
    saved: SavedQuantization | None = None,
    file_itemsize: int = FILE_ITEMSIZE,
) -> list[PlannedParameter]:
    """Return the ZeRO-3 parameters of a run, in the model's order.

    They are those that ``ShardLoader`` makes for the base and ``inject`` makes for the adapters.

    Args:
        model: a model on the meta device, without adapters.
        sites: linears that carry adapters.
        method: the method, which gives the tensors of each adapter.
        trained: names of modules trained in full.
        whole: names of linears that are not quantised, besides the output head.
        quantize: True if linears are held in 4 bits.
        double_quant: True if block scales are quantised to 8 bits. Ignored if ``saved`` is given.
        dtype: dtype that DeepSpeed holds the parameters in.
        saved: the quantisation of the base files; None if they hold floats.
        file_itemsize: bytes per weight in base files that hold floats.
    """
    skipped = saved.skipped if saved else ()
    double_quant = saved.double_quant if saved else double_quant
    found: list[PlannedParameter] = []
    seen: set[int] = set()
    chosen = {site.name: site for site in sites}
    unpacked = {output_head(model), *whole}
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
            packs = quantize and name not in trained and _is_packed(module, leaf, name in unpacked)
            if packs and not any(_is_under(name, outer) for outer in skipped):
                in_file = None if saved else file_itemsize
                found += _packed(name, leaf, parameter, double_quant, dtype, in_file)
            else:
                kind = _kind(module, leaf, name in trained)
                found.append(_whole(name, leaf, parameter, kind, file_itemsize))
    return found


def ties(model: PreTrainedModel) -> list[tuple[str, str]]:
    """Find the parameters that several modules of a model share.

    Returns:
        Pairs of the name of a module and the name of a parameter of an earlier module that it
        shares, such as ("lm_head", "model.embed_tokens.weight").
    """
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


def _is_packed(module: nn.Module, leaf: str, is_whole: bool) -> bool:
    """Return True if a parameter belongs to those that ``--quantization nf4`` quantises.

    They are weights of linears other than the output head and those whose weight the model uses by
    itself, and 3-D weights of experts.

    Args:
        module: the module that has the parameter.
        leaf: name of the parameter in the module.
        is_whole: True if the module is such a linear.
    """
    if is_plain_linear(module):
        return leaf == "weight" and not is_whole
    parameter = module.get_parameter(leaf)
    return parameter.dim() == 3 and not isinstance(module, nn.Embedding)


def _packed(
    module: str,
    leaf: str,
    weight: Tensor,
    double_quant: bool,
    dtype: torch.dtype,
    in_file: int | None,
) -> Iterator[PlannedParameter]:
    """Yield the two parameters that a quantised weight becomes: packed 4-bit values, block scales.

    Args:
        module: name of the module that has the weight.
        leaf: name of the weight in the module.
        weight: the weight, 2-D, or 3-D for all experts of a layer.
        double_quant: True if block scales are quantised to 8 bits.
        dtype: dtype that DeepSpeed holds the parameters in.
        in_file: bytes per weight in the base files; None if they hold the quantised weight.
    """
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
            file_bytes=experts * size if in_file is None else in_file * coming,
        )


def _whole(
    module: str, leaf: str, parameter: Tensor, kind: Kind, file_itemsize: int
) -> PlannedParameter:
    """Return the parameter that a tensor becomes if it is not quantised.

    Args:
        module: name of the module that has the tensor.
        leaf: name of the tensor in the module.
        parameter: the tensor.
        kind: what the tensor holds.
        file_itemsize: bytes per weight in the base files.
    """
    count = parameter.numel()
    return PlannedParameter(
        name=f"{module}.{leaf}",
        module=module,
        kind=kind,
        numel=count,
        in_file=count,
        file_bytes=file_itemsize * count,
    )


def _kind(module: nn.Module, leaf: str, trained: bool) -> Kind:
    if trained:
        return "trained"
    if isinstance(module, nn.Embedding):
        return "embeddings"
    return "plain" if leaf == "weight" and is_plain_linear(module) else "rest"


def shard_bytes(parameters: Sequence[PlannedParameter], world_size: int, itemsize: int) -> int:
    """Return the bytes of one rank's shards of ``parameters``, padding included.

    Args:
        parameters: the parameters to count.
        world_size: number of ranks that each parameter is sharded over.
        itemsize: bytes per element of the dtype that DeepSpeed holds the parameters in.
    """
    return sum(p.share(world_size) for p in parameters) * itemsize
