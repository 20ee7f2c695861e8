"""A PEFT adapter as first values of ours: ``--init_adapter``."""

import json
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from sparse_lora_dist.adapter.peft_config import APART, CONFIG, PREFIX, WEIGHTS, other_kind
from sparse_lora_dist.errors import UserError
from sparse_lora_dist.zero3.shares import Values


def read_peft(
    folder: str, shapes: Mapping[str, tuple[int, ...]], *, rank: int, alpha: float
) -> dict[str, Values]:
    """First values from a PEFT LoRA adapter for the tensors of ``shapes``, read when asked for.

    Keys are "site.lora_a" and "site.lora_b", and "name.weight" for modules trained in full, which
    the adapter need not have. It must have our rank, scale and sites.
    """
    config, values, theirs = open_peft(folder)
    problems = []
    if other_kind(config) or config.get("use_rslora"):
        problems.append("it is not a plain LoRA adapter")
    if config.get("rank_pattern") or config.get("alpha_pattern"):
        problems.append("its modules have different ranks or alphas (rank_pattern, alpha_pattern)")
    if config.get("r") != rank:
        problems.append(f"its rank is {config.get('r')}, --rank is {rank}")
    if config.get("lora_alpha") != alpha:
        problems.append(f"its alpha is {config.get('lora_alpha')}, --alpha is {alpha}")
    # A fault above would only repeat itself in every tensor.
    if problems := problems or _misfits(theirs, shapes):
        raise UserError(f"--init_adapter {folder}: " + "; ".join(problems))
    return values


def open_peft(
    folder: str, flag: str = "--init_adapter"
) -> tuple[dict[str, Any], dict[str, Values], dict[str, tuple[int, ...]]]:
    """(adapter_config.json, values, shapes) of a folder or hub id. Values are read when asked for.

    Names are ours: "site.lora_a", "site.lora_b", and "name.weight" for modules trained in full.
    """
    config, files = _open_files(folder, flag)
    saved = {_our_name(key): file.get_slice(key) for file in files for key in file.keys()}  # noqa: SIM118  safe_open is no dict
    shapes = {name: tuple(tensor.get_shape()) for name, tensor in saved.items()}
    values = {name: _range_of(tensor, shapes[name]) for name, tensor in saved.items()}
    return config, values, shapes


def _range_of(tensor: Any, shape: tuple[int, ...]) -> Values:
    """Elements of a flattened tensor on disk, of which only the rows that hold them are read."""
    columns = prod(shape[1:])

    def values(start: int, stop: int) -> Tensor:
        first_row, last_row = start // columns, -(-stop // columns)
        rows: Tensor = tensor[first_row:last_row].flatten()
        return rows[start - first_row * columns : stop - first_row * columns]

    return values


def _misfits(
    theirs: Mapping[str, tuple[int, ...]], shapes: Mapping[str, tuple[int, ...]]
) -> list[str]:
    if other := sorted(_sites(theirs) ^ _sites(shapes)):
        return [f"its modules and --target_modules differ in {len(other)}, the first is {other[0]}"]
    if extra := sorted(theirs.keys() - shapes.keys()):
        return [f"it trained {extra[0]} in full, which --modules_to_save does not name"]
    return [
        f"{name} has shape {list(shape)}, this model makes it {list(shapes[name])}"
        for name, shape in theirs.items()
        if shape != tuple(shapes[name])
    ][:1]


def _sites(names: Iterable[str]) -> set[str]:
    return {n.rpartition(".")[0] for n in names if n.endswith((".lora_a", ".lora_b"))}


def _open_files(folder: str, flag: str) -> tuple[dict[str, Any], list[Any]]:
    """adapter_config.json, and the files of weights opened."""
    if not Path(folder).is_dir():
        from huggingface_hub import snapshot_download

        try:
            folder = snapshot_download(folder, allow_patterns=["adapter_*", APART])
        except Exception as error:  # the hub raises a dozen kinds
            raise UserError(
                f"{flag} {folder}: not a folder here, and the hub says: {error}"
            ) from error
    config, weights, apart = (Path(folder) / name for name in (CONFIG, WEIGHTS, APART))
    absent = [p.name for p in (config, weights) if not p.exists()]
    if absent:
        raise UserError(
            f"{flag} {folder} has no {' and no '.join(absent)}; give a PEFT adapter folder."
        )
    try:
        # Of one rank for all, exports keep what was trained in full in a file of its own.
        there = [path for path in (weights, apart) if path.exists()]
        return json.loads(config.read_text()), [safe_open(str(p), framework="pt") for p in there]
    except (ValueError, SafetensorError) as error:
        raise UserError(f"{flag} {folder} is damaged: {error}") from error


def _our_name(key: str) -> str:
    name = key.removeprefix(PREFIX)
    for theirs, ours in (("lora_A.weight", "lora_a"), ("lora_B.weight", "lora_b")):
        if name.endswith(theirs):
            return name.removesuffix(theirs) + ours
    return name
