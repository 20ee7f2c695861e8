"""Write a cache of the quantised base model, one weight at a time, right after it was loaded.

All ranks gather each weight. One rank writes it to a disk that several nodes share, or else one
rank of each node. If a cache cannot be written, a warning is printed and the run goes on without
it.

A weight of the model may be made from several tensors of the original files, such as one for each
expert, and each of these tensors may be a stack of matrices. Letters at the end of names: K tensors
that make a weight, E matrices in one of these tensors.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import bitsandbytes.functional as bnb
import torch
from bitsandbytes.utils import pack_dict_to_tensor, unpack_tensor_to_dict
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel

from sparse_lora_dist.base_model import nf4
from sparse_lora_dist.base_model.cache.content import hashes_of
from sparse_lora_dist.base_model.cache.folder import CacheFolder, new_token
from sparse_lora_dist.base_model.cache.lookup import ABOUT, BaseCache
from sparse_lora_dist.base_model.frozen_linear import QuantLinear
from sparse_lora_dist.base_model.quant_experts import QuantExperts
from sparse_lora_dist.base_model.safetensors_reader import CPU, CheckpointFiles, Entry, Source
from sparse_lora_dist.base_model.safetensors_writer import (
    SafetensorsWriter,
    header_room,
    write_synced,
)
from sparse_lora_dist.base_model.weight_map import STATE, STATE_TENSORS, Sources
from sparse_lora_dist.distributed import comm
from sparse_lora_dist.distributed.console import print_line
from sparse_lora_dist.zero3.parameters import gathered

COMPUTE_DTYPE = torch.bfloat16
"""dtype to which bitsandbytes dequantises if other programs load the cache. This project ignores it
and dequantises to the dtype of ``--precision``."""
BLOCK_BYTES = 2**25
"""Number of bytes of an original file that are copied at a time."""
SMALL_PARTS = 2**11
"""Upper bound of the bytes that one quantised tensor needs for its code tables and for the
description that bitsandbytes saves of it. The required disk space is computed with it."""


@dataclass(frozen=True, slots=True)
class CachedWeight:
    """A weight that the model holds in 4 bits, and that is written to the cache."""

    source: Source
    """Where the original files hold the weight."""
    layout: nf4.Layout
    """Layout of the weight's packed bytes and scales."""
    packed: nn.Parameter
    """Sharded parameter that holds the packed bytes."""
    scales: nn.Parameter
    """Sharded parameter that holds the bytes of the scales."""


def write_cache(
    cache: BaseCache,
    model: PreTrainedModel,
    folder: Path,
    files: CheckpointFiles,
    sources: Sources,
) -> None:
    """Write the cache of the base model that ``model`` holds, if a node lacks it. Collective.

    If ``find_cache`` found no usable cache, load the original files and then call this function. A
    failure to write is printed as a warning and not raised, so that training goes on.

    Args:
        cache: the cache to write, from ``find_cache``.
        model: the loaded and sharded model.
        folder: local folder that the model was loaded from.
        files: the opened original safetensors files.
        sources: dict from the name of each parameter to where the original files hold it.
    """
    held = list(_cached_weights(model, sources))
    quantized = {key for h in held for key in h.source.keys}
    plain = {key: entry for key, entry in files.entries.items() if key not in quantized}
    parts = ("", STATE + "nf4", *STATE_TENSORS)
    names = [*plain, *(key + part for key in quantized for part in parts)]
    header_bytes = header_room(names)
    needed = sum(h.layout.packed_bytes + h.layout.scale_bytes for h in held)
    needed += sum(e.nbytes for e in plain.values()) + len(quantized) * SMALL_PARTS + header_bytes

    own, token = CacheFolder(cache.folder), new_token()
    if comm.is_first_on_its_node() and not cache.here:
        own.begin(token, needed=needed, header_bytes=header_bytes)
    if any(comm.gather_objects(own.out is not None)):
        own.do(lambda out: _copy(plain, files, out))
        comm.barrier()  # its timeout is a day; that of the gathers below is far shorter
        for weight in held:
            with gathered([weight.packed, weight.scales]):
                own.do(lambda out, weight=weight: _save(weight, out))  # type: ignore[misc]
        own.do(lambda out: _describe(out, cache, model, folder))
        own.publish(cache.can_stay)
    everyone = comm.gather_objects((own.out is not None, own.problem))
    problems = [problem for _, problem in everyone if problem]
    if problems:
        print_line(
            "warning",
            f"--base_cache was not written, and training goes on without it. Cause: {problems[0]}",
        )
    elif any(written for written, _ in everyone):
        print_line("cache", f"the base was written to {cache.folder}")


def _cached_weights(model: nn.Module, sources: Sources) -> Iterator[CachedWeight]:
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear):
            source = cast(Source, sources[f"{name}.weight"])
            yield CachedWeight(source, module.layout, module.weight, module.scales)
        elif isinstance(module, QuantExperts):
            for leaf, layout in module.layouts.items():
                first = module.matrix(leaf, 0)
                yield CachedWeight(
                    cast(Source, sources[f"{name}.{leaf}"]), layout, first.packed, first.scales
                )


def _copy(plain: Mapping[str, Entry], files: CheckpointFiles, out: SafetensorsWriter) -> None:
    """Copy the tensors that are not quantised from the original files to the cache.

    Args:
        plain: these tensors, by name.
        files: the opened original safetensors files.
        out: writer of the cache's files.
    """
    for key, entry in plain.items():
        out.add(key, entry.dtype, entry.shape, files.raw(entry, BLOCK_BYTES))


def _save(weight: CachedWeight, out: SafetensorsWriter) -> None:
    """Write a quantised weight to the cache, under the names that it has in the original files.

    Args:
        weight: the weight, whose parameters ZeRO-3 has gathered.
        out: writer of the cache's files.
    """
    packed, scales = (p.data.view(torch.uint8).cpu() for p in (weight.packed, weight.scales))
    for name, tensor in saved_tensors(packed, scales, weight.layout, weight.source):
        out.add_tensor(name, tensor)


def saved_tensors(
    packed: Tensor, scales: Tensor, layout: nf4.Layout, source: Source
) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) for each tensor that bitsandbytes saves for a quantised weight.

    Args:
        packed: uint8, packed bytes of the whole weight. Padding at the end is allowed.
        scales: uint8, bytes of the weight's scales. Padding at the end is allowed.
        layout: layout of the weight.
        source: names and shapes of the weight's tensors in the original files. The cache uses the
            same names.
    """
    count = len(source.keys)
    packed_K = packed[: layout.packed_bytes].view(count, -1, 1)
    # Cloned to be aligned: ZeRO-3 may gather to an unaligned address.
    scales = scales[: layout.scale_bytes].clone()
    sizes = [4 * layout.num_nested, 4 * layout.count] if layout.double_quant else []
    *nested_and_offset, absmax = scales.split([*sizes, layout.scale_bytes - sum(sizes)])
    for k, (key, shape) in enumerate(zip(source.keys, source.shapes, strict=True)):
        state = bnb.QuantState(
            absmax=absmax.view(count, -1)[k],
            shape=torch.Size(shape),
            code=bnb.get_4bit_type(layout.quant_type, device="cpu"),
            blocksize=layout.block,
            quant_type=layout.quant_type,
            dtype=COMPUTE_DTYPE,
        )
        if not layout.double_quant:
            state.absmax = state.absmax.view(torch.float32)
            yield from _named(key, packed_K[k], state, [])
            continue
        nested, offset_E = (t.view(torch.float32).view(count, -1)[k] for t in nested_and_offset)
        state.nested, state.offset = True, offset_E[0]
        state.state2 = bnb.QuantState(
            absmax=nested,
            code=nf4.dynamic_map(CPU),
            blocksize=layout.nested_block,
            dtype=torch.float32,
        )
        yield from _named(key, packed_K[k], state, offset_E.tolist())


def _named(
    key: str, packed: Tensor, state: bnb.QuantState, offset_E: list[float]
) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) for the packed bytes of a weight and for each tensor of its state.

    Args:
        key: name of the weight in the original files.
        packed: packed bytes of the weight.
        state: bitsandbytes' description of the weight (shape, block size, scales and so on).
        offset_E: for each matrix, the number that double quantisation subtracted from its scales;
            empty without double quantisation.
    """
    yield key, packed
    for part, tensor in state.as_dict(packed=True).items():
        if part.startswith("quant_state"):
            about = unpack_tensor_to_dict(tensor)
            if len(offset_E) > 1:  # each expert of a stack has its own
                about["nested_offset"] = offset_E
            tensor = _padded(pack_dict_to_tensor(about))
        yield f"{key}.{part}", tensor


def _padded(text: Tensor) -> Tensor:
    """Return JSON text padded with spaces to a multiple of 8 bytes, so the next tensor is aligned.

    Args:
        text: uint8, 1-D, the bytes of the text.
    """
    spaces = text.new_full((-text.numel() % 8,), ord(" "))
    return torch.cat([text, spaces])


def _describe(
    out: SafetensorsWriter, cache: BaseCache, model: PreTrainedModel, folder: Path
) -> None:
    """Complete the safetensors files of the cache, and write config.json and base_cache.json.

    Args:
        out: writer of the cache's files, to which all tensors were added.
        cache: the cache.
        model: the loaded model.
        folder: local folder that the model was loaded from.
    """
    out.finish()
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=cache.made_of["double_quant"],
        bnb_4bit_compute_dtype=COMPUTE_DTYPE,
        bnb_4bit_quant_storage=torch.uint8,
        llm_int8_skip_modules=cache.not_quantized,
    ).to_dict()
    write_synced(out.folder / "config.json", config)
    about = {"made_of": cache.made_of, "model": str(folder), "dates": cache.dates}
    about["sha256"] = hashes_of(out.folder)
    write_synced(out.folder / ABOUT, about)
