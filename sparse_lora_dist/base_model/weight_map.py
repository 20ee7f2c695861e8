"""What each parameter of a model is in the files of a checkpoint.

transformers renames and stacks tensors while it loads; the same rules are asked here, for names
alone. Tensors that bitsandbytes quantised stand in the files as ``NAME``, ``NAME.absmax`` and so
on, and come as a ``Packed``.
"""

import json
import struct
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import bitsandbytes.functional as bnb
import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from sparse_lora_dist.base_model import nf4
from sparse_lora_dist.base_model.safetensors_reader import (
    CPU,
    DTYPES,
    FLOATS,
    CheckpointFiles,
    Entry,
    Source,
)
from sparse_lora_dist.distributed import comm
from sparse_lora_dist.errors import UserError

STATE = ".quant_state.bitsandbytes__"
COMPONENTS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")


@dataclass(frozen=True, kw_only=True, slots=True)
class Packed:
    """A weight that the files hold quantised: its bytes as ``nf4.Layout`` lays them out."""

    layout: nf4.Layout
    packed: Source
    scales: Source


Keys = dict[str, list[str]]
"""The model's name of a tensor -> the files' names of those that it is made of, in order."""

Sources = dict[str, Source | Packed]
"""By the model's name of a parameter, or of a buffer that is saved."""


def find_sources(
    model: PreTrainedModel, files: CheckpointFiles, keys_of: Keys, *, new: Collection[str] = ()
) -> Sources:
    """The source of every parameter of ``model`` but those of ``new``, and of those saved buffers
    that the files hold.

    Raises:
        UserError: a tensor is missing, or is of another shape or of a dtype that is not read.
    """
    same: dict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        same[id(parameter)].append(name)
    sources: Sources = {}
    for name, parameter in model.named_parameters():
        if name in new:
            continue
        # Of tied parameters the files hold one, under any of their names, or the same twice.
        held = [keys_of[n] for n in same[id(parameter)] if n in keys_of]
        keys = held[0] if held else None
        for other in held[1:]:
            if not files.same(held[0][0], other[0], comm.rank(), comm.world_size()):
                raise UserError(
                    f"{files.folder}: config.json ties {held[0][0]} and {other[0]}, but the files "
                    "hold two different tensors. Set tie_word_embeddings to false in config.json."
                )
        if keys is None:
            raise UserError(
                f"{files.folder} holds no tensor {name!r}, which config.json asks for. "
                "Is it the checkpoint of another architecture, or an incomplete download?"
            )
        sources[name] = source_of(name, tuple(parameter.shape), keys, files)
    for name, buffer in model.named_buffers():
        if name in keys_of:
            sources[name] = source_of(name, tuple(buffer.shape), keys_of[name], files)
    return sources


def is_quantized(files: CheckpointFiles) -> bool:
    """Did bitsandbytes quantise any of the tensors?"""
    return any(STATE in key for key in files.entries)


def find_keys(model: PreTrainedModel, files: CheckpointFiles) -> Keys:
    """What the files hold of the parameters and buffers of ``model``."""
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    prefix = getattr(model, "base_model_prefix", None)
    names = model.state_dict()
    found: dict[str, dict[str | None, list[str]]] = defaultdict(lambda: defaultdict(list))
    for key in sorted(_tensors(files), key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, prefix, names)
        if name not in names and key in names:
            name, pattern = key, None
        found[name][pattern].append(key)
    converter_of = {p: c for c in converters for p in c.source_patterns}
    return {
        name: by_pattern[None] if None in by_pattern else _stacked(name, by_pattern, converter_of)
        for name, by_pattern in found.items()
        if name in names
    }


def _tensors(files: CheckpointFiles) -> list[str]:
    """The tensors of the files, without what belongs to quantised ones."""
    states = [key for key in files.entries if STATE in key]
    quantized = {key.partition(STATE)[0] for key in states}
    parts = {name + ending for name in quantized for ending in COMPONENTS}
    return [key for key in files.entries if key not in parts and STATE not in key]


def _stacked(
    name: str, by_pattern: dict[str | None, list[str]], converter_of: dict[str, WeightConverter]
) -> list[str]:
    """The keys of one weight of experts: of the first one its gate, its up, of the next one ..."""
    converter = converter_of[str(next(iter(by_pattern)))]
    merge, *joins = converter.operations
    plain = isinstance(merge, MergeModulelist) and merge.dim == 0
    if not plain or not all(isinstance(j, Concatenate) and j.dim == 1 for j in joins):
        raise UserError(
            f"{name} is made from several tensors in a way that is not supported "
            f"({', '.join(type(o).__name__ for o in converter.operations)}); supported are experts "
            "stacked one after another. Use another model."
        )
    columns = [by_pattern[pattern] for pattern in converter.source_patterns]
    if len({len(column) for column in columns}) > 1:
        raise UserError(f"{name}: not every expert is in the files. Download the model again.")
    return [key for keys in zip(*columns, strict=True) for key in keys]


def source_of(
    name: str, shape: tuple[int, ...], keys: Sequence[str], files: CheckpointFiles
) -> Source | Packed:
    """The source of one parameter, once it is sure to have its shape and a dtype that is read."""
    states = [_state(key, files) for key in keys]
    quantized = [state for state in states if state is not None]
    if quantized and len(quantized) < len(keys):
        raise UserError(f"{name}: some of its tensors are quantised in the files, others are not.")
    shapes = [tuple(s["shape"]) for s in quantized] or [files.entries[k].shape for k in keys]
    # A stack of experts: each tensor is a matrix, or some rows of one.
    stacked = len(keys) > 1 and {s[1:] for s in shapes} == {shape[2:]}
    fits = sum(prod(s) for s in shapes) == prod(shape) if stacked else shapes == [shape]
    if not fits:
        raise UserError(
            f"{files.entries[keys[0]].file}: tensor {keys[0]!r} has shape {list(shapes[0])}, "
            f"but config.json makes {name} {list(shape)}. "
            "Weights and config.json do not belong together."
        )
    if quantized:
        return _packed(name, keys, quantized, files)
    return _plain(keys, files)


def _plain(keys: Sequence[str], files: CheckpointFiles) -> Source:
    entries = [files.entries[key] for key in keys]
    for key, entry in zip(keys, entries, strict=True):
        if entry.dtype not in FLOATS or entry.dtype != entries[0].dtype:
            raise UserError(
                f"{entry.file}: tensor {key!r} is {entry.dtype}; allowed are {', '.join(FLOATS)}, "
                "and what bitsandbytes saved in 4 bits. Use the original weights."
            )
    return Source(keys=tuple(keys), parts=tuple(entries), dtype=DTYPES[entries[0].dtype])


def _state(key: str, files: CheckpointFiles) -> dict[str, Any] | None:
    """What bitsandbytes noted of a quantised tensor; None for one that is not."""
    names = [key + STATE + kind for kind in ("nf4", "fp4")]
    return next((_read_state(name, files) for name in names if name in files.entries), None)


def _read_state(key: str, files: CheckpointFiles) -> dict[str, Any]:
    """What bitsandbytes noted of a quantised tensor, from the tensor of that name.

    Raises:
        UserError: it is not what bitsandbytes writes.
    """
    try:
        state: dict[str, Any] = json.loads(bytes(files.whole(key).numpy()))
    except ValueError:
        state = {}
    if not (isinstance(state, dict) and _is_whole(state)):
        raise UserError(
            f"{files.entries[key].file}: tensor {key!r} is not as bitsandbytes writes it. "
            "Download the model again."
        )
    return state


def _is_whole(state: Mapping[str, Any]) -> bool:
    shape, block = state.get("shape"), state.get("blocksize")
    sizes = [*shape, block] if isinstance(shape, list) and len(shape) > 1 else [0]
    return state.get("quant_type") in ("nf4", "fp4") and all(
        isinstance(size, int) and size > 0 for size in sizes
    )


def _packed(
    name: str, keys: Sequence[str], states: Sequence[Mapping[str, Any]], files: CheckpointFiles
) -> Packed:
    first = states[0]
    *stack, rows, columns = first["shape"]
    layout = nf4.Layout(
        shape=(rows, columns),
        count=prod(stack) * len(keys),
        double_quant="nested_offset" in first,
        block=first["blocksize"],
        nested_block=first.get("nested_blocksize", nf4.NESTED_BLOCK),
        quant_type=first["quant_type"],
    )
    unlike = [s for s in states if _but_offset(s) != _but_offset(first)]
    lacking = [k + c for k in keys for c in _components(layout) if k + c not in files.entries]
    if unlike or lacking or not _usual_codes(keys[0], layout, files):
        what = f"{lacking[0]} is missing" if lacking else "its codes or block sizes are unusual"
        raise UserError(
            f"{files.entries[keys[0]].file}: {name} is quantised in a way that is not read "
            f"({what}); read are bitsandbytes' NF4 and FP4. Use the original weights."
        )
    offsets = [offset for s in states for offset in _listed(s.get("nested_offset", []))]
    scales = [*_entries(keys, ".nested_absmax", files), struct.pack(f"<{len(offsets)}f", *offsets)]
    scales = scales if layout.double_quant else []
    found = Packed(
        layout=layout,
        packed=_bytes(keys, _entries(keys, "", files)),
        scales=_bytes(keys, [*scales, *_entries(keys, ".absmax", files)]),
    )
    sizes = (found.packed.nbytes, found.scales.nbytes)
    if sizes != (layout.packed_bytes, layout.scale_bytes):
        raise UserError(
            f"{files.entries[keys[0]].file}: {name} has {sizes[0]} packed bytes and {sizes[1]} of "
            f"scales; its shape makes it {layout.packed_bytes} and {layout.scale_bytes}. "
            "Download the model again."
        )
    return found


def _components(layout: nf4.Layout) -> tuple[str, ...]:
    return COMPONENTS if layout.double_quant else COMPONENTS[:2]


def _but_offset(state: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in state.items() if key != "nested_offset"}


def _listed(value: Any) -> list[float]:
    return value if isinstance(value, list) else [value]


def _entries(keys: Sequence[str], ending: str, files: CheckpointFiles) -> list[Entry | bytes]:
    return [files.entries[key + ending] for key in keys if key + ending in files.entries]


def _bytes(keys: Sequence[str], parts: Sequence[Entry | bytes]) -> Source:
    """Packed bytes may wear any dtype in the files (``bnb_4bit_quant_storage``)."""
    return Source(keys=tuple(keys), parts=tuple(parts), dtype=torch.uint8)


def _usual_codes(key: str, layout: nf4.Layout, files: CheckpointFiles) -> bool:
    """Do the codes of the files stand for the numbers that bitsandbytes' kernels have built in?"""
    codes = {".quant_map": bnb.get_4bit_type(layout.quant_type, device="cpu")}
    if layout.double_quant:
        codes[".nested_quant_map"] = nf4.dynamic_map(CPU)
    entries = {c: files.entries[key + c] for c in codes}
    # In the order of cost; another dtype or shape cannot be compared.
    return all(
        entries[c].dtype == "F32"
        and entries[c].shape == tuple(code.shape)
        and torch.allclose(files.whole(key + c), code)
        for c, code in codes.items()
    )
