"""Writes base files of any size that take little disk space: sparse files with holes for weights.

Holes read as zeros, which take as long to quantise as random numbers. The first tensor of each
shape holds random numbers, so that its quantisation can be checked.
"""

import json
from math import prod
from pathlib import Path

import torch
from transformers import PretrainedConfig

from sparse_lora_dist.base_model.architecture import meta_model

FILE_BYTES = 5_000_000_000
ITEMSIZE = 2
BLOCK = 2**22 - 1
"""Numbers drawn at a time; odd, so that no two rows or blocks of a tensor are alike."""

Shapes = dict[str, tuple[int, ...]]


def save(folder: Path, config: PretrainedConfig, *, only_holes: bool = False) -> list[str]:
    """The model of ``config`` in bf16; names of the tensors that hold random numbers, none with
    ``only_holes``."""
    config.save_pretrained(folder)
    model = meta_model(
        config,
        task="causal_lm",
        dtype=torch.bfloat16,
        attn_implementation=None,
        trust_remote_code=False,
    )
    shapes: Shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    first_of = {} if only_holes else {shape: name for name, shape in reversed(shapes.items())}
    files = _split(shapes)
    weight_map = {}
    for number, names in enumerate(files, start=1):
        file = f"model-{number:05}-of-{len(files):05}.safetensors"
        weight_map |= dict.fromkeys(names, file)
        _write(folder / file, {name: shapes[name] for name in names}, set(first_of.values()))
    total = ITEMSIZE * sum(prod(shape) for shape in shapes.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return list(first_of.values())


def _split(shapes: Shapes) -> list[list[str]]:
    files: list[list[str]] = [[]]
    size = 0
    for name, shape in shapes.items():
        if files[-1] and size + ITEMSIZE * prod(shape) > FILE_BYTES:
            files.append([])
            size = 0
        files[-1].append(name)
        size += ITEMSIZE * prod(shape)
    return files


def _write(file: Path, shapes: Shapes, filled: set[str]) -> None:
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + ITEMSIZE * prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + end)
        for name in shapes.keys() & filled:
            start, stop = header[name]["data_offsets"]
            stream.seek(8 + len(text) + start)
            _fill(stream, (stop - start) // ITEMSIZE)


def _fill(stream, numel: int) -> None:  # type: ignore[no-untyped-def]
    """Random numbers, blocks of them of different sizes, so that scales differ too."""
    numbers = torch.randn(BLOCK, generator=torch.Generator().manual_seed(0)) * 0.02
    for number, start in enumerate(range(0, numel, BLOCK)):
        part = numbers[: numel - start] * (1 + number % 5)
        stream.write(part.bfloat16().view(torch.uint8).numpy().data)
