"""Find the tensors of the base files that each parameter of a model is made from.

transformers renames and stacks tensors while it loads a model. Its rules are applied here to names
only. A weight that bitsandbytes quantised has several tensors in the files (``NAME``,
``NAME.absmax``, ...), which make one ``Packed``.
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
"""Ending, before "nf4" or "fp4", of the tensor with bitsandbytes' description of a weight."""
STATE_TENSORS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")
"""Endings of the other tensors of a weight; the last two with double quantisation only."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Packed:
    """A weight that the files hold in 4 bits."""

    layout: nf4.Layout
    packed: Source
    """Its packed bytes, uint8."""
    scales: Source
    """The bytes of its scales, uint8, in the order of ``nf4.py``."""


Keys = dict[str, list[str]]
"""Name of a tensor in the model -> names of the tensors of the files it is made from, in order."""

Sources = dict[str, Source | Packed]
"""Name of a parameter or persistent buffer in the model -> where the files hold it."""


def find_sources(
    model: PreTrainedModel, files: CheckpointFiles, keys_of: Keys, *, new: Collection[str] = ()
) -> Sources:
    """Find the source of every parameter, and of the persistent buffers that the files hold.

    All ranks must call it, since each compares only its own part of tied tensors. It communicates
    nothing, and an error may come on one rank alone: call it inside ``fail_together``.

    Args:
        model: the model on the meta device.
        files: the opened base files.
        keys_of: from ``find_keys``.
        new: names of parameters that the files need not hold.

    Raises:
        UserError: a tensor is missing, or has a wrong shape or an unsupported dtype, or two tied
            tensors differ.
    """
    same: dict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        same[id(parameter)].append(name)
    sources: Sources = {}
    for name, parameter in model.named_parameters():
        if name in new:
            continue
        # Of tied parameters the files hold one tensor, under any of their names, or equal copies.
        held = [keys_of[n] for n in same[id(parameter)] if n in keys_of]
        keys = held[0] if held else None
        for other in held[1:]:
            if not files.same(held[0][0], other[0], comm.rank(), comm.world_size()):
                raise UserError(
                    f"{files.folder}: config.json ties {held[0][0]} and {other[0]}, but they are "
                    "two different tensors in the files. Set tie_word_embeddings to false in "
                    "config.json."
                )
        if keys is None:
            raise UserError(
                f"{files.folder} holds no tensor {name!r}, which the model of config.json has. "
                "Download the model again, or use the config.json that belongs to these weights."
            )
        sources[name] = source_of(name, tuple(parameter.shape), keys, files)
    for name, buffer in model.named_buffers():
        if name in keys_of:
            sources[name] = source_of(name, tuple(buffer.shape), keys_of[name], files)
    return sources


def is_quantized(files: CheckpointFiles) -> bool:
    """Return True if the files hold any tensor that bitsandbytes quantised to 4 bits."""
    return any(STATE in key for key in files.entries)


def find_keys(model: PreTrainedModel, files: CheckpointFiles) -> Keys:
    """Match the tensors of the files to the parameters and buffers of ``model``, by name only.

    Args:
        model: the model on the meta device.
        files: the opened base files.

    Returns:
        Entries of those names of ``model.state_dict()`` that the files hold.

    Raises:
        UserError: transformers builds a parameter from several tensors in an unsupported way.
    """
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
    """Names of the tensors in the files, without scales and descriptions of quantised ones."""
    states = [key for key in files.entries if STATE in key]
    quantized = {key.partition(STATE)[0] for key in states}
    state_tensors = {name + ending for name in quantized for ending in STATE_TENSORS}
    return [key for key in files.entries if key not in state_tensors and STATE not in key]


def _stacked(
    name: str, by_pattern: dict[str | None, list[str]], converter_of: dict[str, WeightConverter]
) -> list[str]:
    """Return the keys of a stacked expert weight: gate and up of expert 0, of expert 1, ..."""
    converter = converter_of[str(next(iter(by_pattern)))]
    merge, *joins = converter.operations
    plain = isinstance(merge, MergeModulelist) and merge.dim == 0
    if not plain or not all(isinstance(j, Concatenate) and j.dim == 1 for j in joins):
        raise UserError(
            f"transformers makes {name} from several tensors in a way that is not supported "
            f"({', '.join(type(o).__name__ for o in converter.operations)}). Supported are expert "
            "matrices stacked one after another. Use another model."
        )
    columns = [by_pattern[pattern] for pattern in converter.source_patterns]
    if len({len(column) for column in columns}) > 1:
        raise UserError(f"{name}: some experts are missing in the files. Download the model again.")
    return [key for keys in zip(*columns, strict=True) for key in keys]


def source_of(
    name: str, shape: tuple[int, ...], keys: Sequence[str], files: CheckpointFiles
) -> Source | Packed:
    """Check shape and dtype of one parameter and return its source.

    Args:
        name: name in the model, for messages.
        shape: shape in the model.
        keys: names, in the files, of the tensors that it is made from.
        files: the opened base files.

    Raises:
        UserError: a tensor has a wrong shape or an unsupported dtype or quantisation.
    """
    states = [_state(key, files) for key in keys]
    quantized = [state for state in states if state is not None]
    if quantized and len(quantized) < len(keys):
        raise UserError(
            f"{name}: the files hold some of its tensors quantised and others not, which is not "
            "supported. Use the original weights."
        )
    shapes = [tuple(s["shape"]) for s in quantized] or [files.entries[k].shape for k in keys]
    # In a stack of experts each tensor is a matrix, or some rows of one.
    stacked = len(keys) > 1 and {s[1:] for s in shapes} == {shape[2:]}
    fits = sum(prod(s) for s in shapes) == prod(shape) if stacked else shapes == [shape]
    if not fits:
        raise UserError(
            f"{files.entries[keys[0]].file}: tensor {keys[0]!r} has shape {list(shapes[0])}, but "
            f"{name} has shape {list(shape)} in the model of config.json. Use the config.json that "
            "belongs to these weights."
        )
    if quantized:
        return _packed(name, keys, quantized, files)
    return _plain(keys, files)


def _plain(keys: Sequence[str], files: CheckpointFiles) -> Source:
    entries = [files.entries[key] for key in keys]
    for key, entry in zip(keys, entries, strict=True):
        if entry.dtype not in FLOATS or entry.dtype != entries[0].dtype:
            raise UserError(
                f"{entry.file}: tensor {key!r} is {entry.dtype}. All tensors of a weight must be "
                f"one of {', '.join(FLOATS)}, or saved in 4 bits by bitsandbytes. Use the original "
                "weights."
            )
    return Source(keys=tuple(keys), parts=tuple(entries), dtype=DTYPES[entries[0].dtype])


def _state(key: str, files: CheckpointFiles) -> dict[str, Any] | None:
    """Return bitsandbytes' description of a quantised tensor, None if it is not quantised."""
    names = [key + STATE + kind for kind in ("nf4", "fp4")]
    return next((_read_state(name, files) for name in names if name in files.entries), None)


def _read_state(key: str, files: CheckpointFiles) -> dict[str, Any]:
    try:
        state: dict[str, Any] = json.loads(bytes(files.whole(key).numpy()))
    except ValueError:
        state = {}
    if not (isinstance(state, dict) and _is_complete(state)):
        raise UserError(
            f"{files.entries[key].file}: tensor {key!r} is not a valid quantisation state of "
            "bitsandbytes. Download the model again."
        )
    return state


def _is_complete(state: Mapping[str, Any]) -> bool:
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
    differ = any(_without_offset(s) != _without_offset(first) for s in states)
    missing = [k + e for k in keys for e in _state_endings(layout) if k + e not in files.entries]
    if differ or missing or not _has_standard_codes(keys[0], layout, files):
        what = (
            f"{missing[0]} is missing" if missing else "its codes or block sizes are not standard"
        )
        raise UserError(
            f"{files.entries[keys[0]].file}: {name} is quantised in a way that is not supported "
            f"({what}). Supported are bitsandbytes' NF4 and FP4. Use the original weights."
        )
    offsets = [offset for s in states for offset in _as_list(s.get("nested_offset", []))]
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
            f"{files.entries[keys[0]].file}: {name} has {sizes[0]} packed bytes and {sizes[1]} "
            f"bytes of scales, but its shape needs {layout.packed_bytes} and "
            f"{layout.scale_bytes}. Download the model again."
        )
    return found


def _state_endings(layout: nf4.Layout) -> tuple[str, ...]:
    return STATE_TENSORS if layout.double_quant else STATE_TENSORS[:2]


def _without_offset(state: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in state.items() if key != "nested_offset"}


def _as_list(value: Any) -> list[float]:
    return value if isinstance(value, list) else [value]


def _entries(keys: Sequence[str], ending: str, files: CheckpointFiles) -> list[Entry | bytes]:
    return [files.entries[key + ending] for key in keys if key + ending in files.entries]


def _bytes(keys: Sequence[str], parts: Sequence[Entry | bytes]) -> Source:
    """Source of raw bytes. Packed bytes may have any dtype in the files
    (``bnb_4bit_quant_storage``)."""
    return Source(keys=tuple(keys), parts=tuple(parts), dtype=torch.uint8)


def _has_standard_codes(key: str, layout: nf4.Layout, files: CheckpointFiles) -> bool:
    """Return True if the code tables in the files are those built into bitsandbytes' kernels."""
    codes = {".quant_map": bnb.get_4bit_type(layout.quant_type, device="cpu")}
    if layout.double_quant:
        codes[".nested_quant_map"] = nf4.dynamic_map(CPU)
    entries = {c: files.entries[key + c] for c in codes}
    # Dtype and shape first: the values are compared only if these match.
    return all(
        entries[c].dtype == "F32"
        and entries[c].shape == tuple(code.shape)
        and torch.allclose(files.whole(key + c), code)
        for c, code in codes.items()
    )
