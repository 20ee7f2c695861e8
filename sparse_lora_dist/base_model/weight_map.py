"""Find the tensors in the safetensors files from which each parameter of a model is made.

transformers renames and stacks tensors while it loads a model. Here its rules are applied to names
only, and no weight is read. The result for each parameter is a ``Source`` (one or more tensors in
the files, joined) or, for a weight that bitsandbytes quantised to 4 bits, a ``Packed``. The files
hold several tensors for such a weight: ``NAME`` with the packed bytes, ``NAME.absmax`` with the
scales, and so on.
"""

import json
import struct
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
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
    WHOLE,
    CheckpointFiles,
    Entry,
    Source,
)
from sparse_lora_dist.distributed import comm
from sparse_lora_dist.errors import UserError

STATE = ".quant_state.bitsandbytes__"
"""bitsandbytes saves its description of weight NAME (shape, block size and so on, as JSON text) in
a tensor whose name is NAME followed by this text and "nf4" or "fp4"."""
STATE_TENSORS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")
"""bitsandbytes appends these to a weight's name to name the tensors of its scales and code tables.
The last two exist only with double quantisation."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Packed:
    """Where and how the files hold a weight that is in 4 bits."""

    layout: nf4.Layout
    """Shape, block size and number format of the weight."""
    packed: Source
    """Where the files hold the packed bytes, read as uint8."""
    scales: Source
    """Where the files hold the bytes of the scales, read as uint8 in the order that ``nf4.py``
    describes."""


Keys = dict[str, list[str]]
"""Dict: name of a tensor in the model -> names of the tensors in the files that make it."""

Sources = dict[str, Source | Packed]
"""Dict: name of a parameter or persistent buffer in the model -> where the files hold it."""


def find_sources(
    model: PreTrainedModel, files: CheckpointFiles, keys_of: Keys, *, new: Collection[str] = ()
) -> Sources:
    """Find where the files hold each parameter, and each persistent buffer that they have.

    If the files hold tied parameters twice, the copies must be equal. Each rank compares only its
    own part of them, so all ranks must call this function. It communicates nothing and may fail on
    one rank only. Call it inside ``fail_together``.

    Args:
        model: the model on the meta device.
        files: the opened safetensors files of the base model.
        keys_of: for each parameter and buffer of the model, the names of its tensors in the files,
            from ``find_keys``.
        new: names of parameters that the files need not hold, such as those of a new classification
            head. They are left out of the result.

    Returns:
        Dict from the name of a parameter or buffer in the model to where the files hold it. Tied
        parameters have one item, under the first of their names.

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
                    f"The config.json in {files.folder} ties {held[0][0]} and {other[0]}, but the "
                    "files hold two different tensors for them. Set tie_word_embeddings to false "
                    "in config.json."
                )
        if keys is None:
            raise UserError(
                f"{files.folder} holds no tensor {name!r}, which the model of config.json has. "
                "Download the model again, or use the config.json that belongs to these weights."
            )
        sources[name] = source_of(name, tuple(parameter.shape), keys, files)
    for name, buffer in model.named_buffers():
        if name in keys_of:
            allowed = FLOATS if buffer.is_floating_point() else (*FLOATS, *WHOLE)
            sources[name] = source_of(name, tuple(buffer.shape), keys_of[name], files, allowed)
    return sources


def is_quantized(files: CheckpointFiles) -> bool:
    """Return True if the files hold any tensor that bitsandbytes quantised to 4 bits."""
    return any(STATE in key for key in files.entries)


def find_keys(model: PreTrainedModel, files: CheckpointFiles) -> Keys:
    """Find by name which tensors in the files make each parameter and buffer of a model.

    No tensor is read. Not collective.

    Args:
        model: the model on the meta device.
        files: the opened safetensors files of the base model.

    Returns:
        Dict from a name in ``model.state_dict()`` to the names of its tensors in the files. Names
        for which the files hold nothing are left out.

    Raises:
        UserError: transformers builds a parameter from several tensors in an unsupported way.
    """
    renamed, converters = _renaming(model)
    names = model.state_dict()
    found: dict[str, dict[str | None, list[str]]] = defaultdict(lambda: defaultdict(list))
    for key in sorted(tensors_of(files), key=dot_natural_key):
        name, pattern = renamed(key)
        if name not in names and key in names:
            name, pattern = key, None
        found[name][pattern].append(key)
    converter_of = {p: c for c in converters for p in c.source_patterns}
    return {
        name: by_pattern[None] if None in by_pattern else _stacked(name, by_pattern, converter_of)
        for name, by_pattern in found.items()
        if name in names
    }


def _renaming(
    model: PreTrainedModel,
) -> tuple[Callable[[str], tuple[str, str | None]], list[WeightConverter]]:
    """Return transformers' rules: a function from the name of a tensor in the files to its name in
    the model and the pattern of a converter, and the converters."""
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    prefix, names = getattr(model, "base_model_prefix", None), model.state_dict()
    return (lambda key: rename_source_key(key, renamings, converters, prefix, names)), converters


def names_of_today(model: PreTrainedModel) -> Callable[[str], str]:
    """Return a function from an older name of a linear to its name in the model, such as from
    "language_model.model.layers.0.mlp.up_proj" to "model.language_model.layers.0.mlp.up_proj".

    Args:
        model: the model on the meta device. The function returns names that the rules of
            transformers do not lead to one of its weights as they are.
    """
    (renamed, _), names = _renaming(model), {*model.state_dict()}

    def today(name: str) -> str:
        found = renamed(f"{name}.weight")[0]
        is_old = f"{name}.weight" not in names and found in names
        return found.removesuffix(".weight") if is_old else name

    return today


def tensors_of(files: CheckpointFiles) -> list[str]:
    """Return the names of the tensors in the files that hold weights and buffers.

    Of a weight in 4 bits this is the tensor of packed bytes. Those of its scales, code tables and
    description are left out.
    """
    states = [key for key in files.entries if STATE in key]
    quantized = {key.partition(STATE)[0] for key in states}
    state_tensors = {name + ending for name in quantized for ending in STATE_TENSORS}
    return [key for key in files.entries if key not in state_tensors and STATE not in key]


def _stacked(
    name: str, by_pattern: dict[str | None, list[str]], converter_of: dict[str, WeightConverter]
) -> list[str]:
    """Return the names in the files of the tensors that make a stacked expert weight, in order.

    For gate_up_proj the order is gate of expert 0, up of expert 0, gate of expert 1, and so on.

    Args:
        name: name of the stacked weight in the model, for messages.
        by_pattern: names of the weight's tensors in the files, grouped by the name pattern of
            transformers that they match. There is one pattern for each projection, such as gate.
        converter_of: for each of these patterns, the rule of transformers that contains it.
    """
    converter = converter_of[str(next(iter(by_pattern)))]
    merge, *joins = converter.operations
    plain = isinstance(merge, MergeModulelist) and merge.dim == 0
    if not plain or not all(isinstance(j, Concatenate) and j.dim == 1 for j in joins):
        raise UserError(
            f"transformers makes {name} from several tensors in a way that is not supported "
            f"({', '.join(type(o).__name__ for o in converter.operations)}). Only expert matrices "
            "that are stacked one after another are supported. Choose another --model."
        )
    columns = [by_pattern[pattern] for pattern in converter.source_patterns]
    if len({len(column) for column in columns}) > 1:
        raise UserError(f"The files of --model lack some experts of {name}. Download them again.")
    return [key for keys in zip(*columns, strict=True) for key in keys]


def source_of(
    name: str,
    shape: tuple[int, ...],
    keys: Sequence[str],
    files: CheckpointFiles,
    allowed: Sequence[str] = FLOATS,
) -> Source | Packed:
    """Return where the files hold one parameter, after checking shapes and dtypes of its tensors.

    Args:
        name: name of the parameter in the model, for messages.
        shape: shape of the parameter in the model.
        keys: names in the files of the tensors that make the parameter, in order.
        files: the opened safetensors files of the base model.
        allowed: dtypes that tensors that are not quantised may have.

    Returns:
        ``Packed`` if the files hold the parameter in 4 bits, otherwise ``Source``.

    Raises:
        UserError: a tensor has a wrong shape or an unsupported dtype or quantisation.
    """
    states = [_state(key, files) for key in keys]
    quantized = [state for state in states if state is not None]
    if quantized and len(quantized) < len(keys):
        raise UserError(
            f"{files.folder} holds some tensors of {name} quantised and others not, which is not "
            "supported. Give a --model with the original weights."
        )
    shapes = [tuple(s["shape"]) for s in quantized] or [files.entries[k].shape for k in keys]
    # In a stack of experts each tensor is a matrix, or some rows of one.
    stacked = len(keys) > 1 and {s[1:] for s in shapes} == {shape[2:]}
    fits = sum(prod(s) for s in shapes) == prod(shape) if stacked else shapes == [shape]
    if len(keys) > 1 and all(s == shape for s in shapes):
        raise UserError(
            f"{files.folder} holds {name} under two names, {keys[0]} and {keys[1]}. Which one is "
            "meant cannot be known. Remove one, or download the model again."
        )
    if not fits:
        raise UserError(
            f"Tensor {keys[0]!r} in {files.entries[keys[0]].file} has shape {list(shapes[0])}, but "
            f"config.json describes a model in which {name} has shape {list(shape)}. Use the "
            "config.json that belongs to these weights."
        )
    if quantized:
        return _packed(name, keys, quantized, files)
    return _plain(keys, files, allowed)


def _plain(keys: Sequence[str], files: CheckpointFiles, allowed: Sequence[str]) -> Source:
    entries = [files.entries[key] for key in keys]
    for key, entry in zip(keys, entries, strict=True):
        if entry.dtype not in allowed or entry.dtype != entries[0].dtype:
            raise UserError(
                f"Tensor {key!r} in {entry.file} has dtype {entry.dtype}. The tensors of a weight "
                f"must all have the same dtype, one of {', '.join(allowed)}, or be saved in 4 bits "
                "by bitsandbytes. Give a --model with the original weights."
            )
    return Source(keys=tuple(keys), parts=tuple(entries), dtype=DTYPES[entries[0].dtype])


def _state(key: str, files: CheckpointFiles) -> dict[str, Any] | None:
    """Return bitsandbytes' description of a weight in 4 bits, or None if it is not in 4 bits.

    Args:
        key: name of the weight in the files.
        files: the opened safetensors files of the base model.

    Returns:
        Dict with the keys "shape", "blocksize", "quant_type" and others that bitsandbytes saves.
    """
    names = [key + STATE + kind for kind in ("nf4", "fp4")]
    return next((_read_state(name, files) for name in names if name in files.entries), None)


def _read_state(key: str, files: CheckpointFiles) -> dict[str, Any]:
    try:
        state: dict[str, Any] = json.loads(bytes(files.whole(key).numpy()))
    except ValueError:
        state = {}
    if not (isinstance(state, dict) and _is_complete(state)):
        raise UserError(
            f"Tensor {key!r} in {files.entries[key].file} is not a valid quantisation state of "
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
    """Return where the files hold a weight in 4 bits, after checking that its format is supported.

    Args:
        name: name of the weight in the model, for messages.
        keys: names in the files of the tensors that make the weight, in order.
        states: bitsandbytes' description of each of these tensors, from ``_state``.
        files: the opened safetensors files of the base model.
    """
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
            f"{missing[0]} is missing"
            if missing
            else "its code tables are not the standard ones, or its experts differ in format"
        )
        raise UserError(
            f"{name} in {files.entries[keys[0]].file} is quantised in a way that is not supported "
            f"({what}). Supported are NF4 and FP4 as bitsandbytes saves them. Give a --model with "
            "the original weights."
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
            f"{name} in {files.entries[keys[0]].file} has {sizes[0]} packed bytes and {sizes[1]} "
            f"bytes of scales, but a weight of its shape has {layout.packed_bytes} and "
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
    """Return a ``Source`` from which several parts are read as one sequence of raw bytes.

    The parts' dtypes in the files are ignored, since bitsandbytes may save packed bytes as a tensor
    of any dtype (``bnb_4bit_quant_storage``).

    Args:
        keys: names in the files of the tensors that make the weight.
        parts: positions of tensors in the files, or literal bytes, in the order of reading.
    """
    return Source(keys=tuple(keys), parts=tuple(parts), dtype=torch.uint8)


def _has_standard_codes(key: str, layout: nf4.Layout, files: CheckpointFiles) -> bool:
    """Return True if the code tables of weight ``key`` are those of bitsandbytes' kernels.

    A code table gives the value that each 4-bit or 8-bit code stands for. The files hold one for
    the weights and, with double quantisation, one for the scales.

    Args:
        key: name of the weight in the files.
        layout: layout of the weight.
        files: the opened safetensors files of the base model.
    """
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
