"""Reads the modules of a PEFT LoRA adapter, exported by this project or saved by PEFT.

Shapes: I in_features, O out_features, R rank.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open

from sparse_lora_dist.adapter.peft_agrees import disagreements
from sparse_lora_dist.adapter.peft_config import (
    APART,
    CONFIG,
    PREFIX,
    WEIGHTS,
    faults_of,
    other_kind,
    scale_of,
)
from sparse_lora_dist.errors import UserError
from sparse_lora_dist.export.weight_change import LowRank
from sparse_lora_dist.show.table import Module
from sparse_lora_dist.system.small_files import parse_json

FACTOR = re.compile(r"(?P<module>.+)\.lora_(?:embedding_)?(?P<factor>[AB])(\.weight)?")
"""Name, without PEFT's prefix, of a tensor that is the factor A or B of a module."""


def head(folder: Path, config: Mapping[str, Any]) -> str:
    """Return the lines above the table: folder, rank of the tensors, alpha and base model; and a
    note if tensors and configuration disagree.

    Args:
        folder: the folder of the adapter.
        config: content of its adapter_config.json.

    Raises:
        UserError: a pattern in the configuration takes too long to match.
    """
    files = _files(folder)
    pairs, full = _sorted(list(files))
    keys = {name: pair["A"] for name, pair in pairs.items() if "A" in pair}
    ranks = {name: int(files[key].get_slice(key).get_shape()[0]) for name, key in keys.items()}
    low, high = min(ranks.values(), default=0), max(ranks.values(), default=0)
    lines = [
        f"adapter   {folder}: LoRA of rank {high if low == high else f'{low} to {high}'}, alpha "
        f"{config.get('lora_alpha')}, for {config.get('base_model_name_or_path')}"
    ]
    said = disagreements(config, ranks, [key.removeprefix(PREFIX) for key in full])
    return "\n".join([*lines, *(f"note      {clause}" for clause in said)])


def read_config(folder: Path) -> dict[str, Any]:
    """Read and check the adapter_config.json of an adapter.

    Args:
        folder: the folder of the adapter.

    Returns:
        Content of the file.

    Raises:
        UserError: if it is damaged, or if the adapter is not plain LoRA. Plain LoRA adds scale *
            B A to a weight and changes nothing else.
    """
    path = folder / CONFIG
    try:
        config = parse_json(path.read_bytes())
    except ValueError as error:
        raise UserError(
            f"{path} is not valid JSON: {error}. Export, save or download the adapter again."
        ) from error
    if not isinstance(config, dict):
        raise UserError(
            f"{path} must be a JSON object, got {type(config).__name__}. Export, save or "
            "download the adapter again."
        )
    if other := other_kind(config):
        raise UserError(
            f"{path} has {other}, so the adapter is not plain LoRA. Only plain LoRA can be shown. "
            "Give another adapter, or a checkpoint."
        )
    if faults := faults_of(config):
        raise UserError(f"{path} has wrong values: {'; '.join(faults)}. Correct them in this file.")
    return config


def modules(folder: Path, config: Mapping[str, Any]) -> Iterator[Module]:
    """Yield the modules of a PEFT adapter: those with factors A and B, then those trained in full.

    The modules of each kind are in the order of their names, with layer 10 after layer 9. A
    module's tensors are read when it is yielded.

    Args:
        folder: the folder of the adapter.
        config: content of its adapter_config.json, checked by ``read_config``.

    Raises:
        UserError: if A or B of a module is missing, or a module has other tensors of an adapter,
            such as DoRA's magnitude.
    """
    files = _files(folder)
    pairs, full = _sorted(list(files))
    if odd := [key for key in full if ".lora_" in key]:  # a bias of B, a magnitude ...
        raise UserError(
            f"{folder} holds {odd[0]}, so it is not plain LoRA. Only plain LoRA can be shown. "
            "Give another adapter, or a checkpoint."
        )
    for name, pair in pairs.items():
        if set(pair) != {"A", "B"}:
            raise UserError(
                f"{folder} is damaged: {name} has lora_{min(pair)} only, but needs lora_A and "
                "lora_B. Export, save or download the adapter again."
            )
        yield _of_pair(files, name, pair, config)
    for key in full:
        tensor = files[key].get_tensor(key)
        yield Module(
            name=key.removeprefix(PREFIX),
            entries=tensor.numel(),
            alive=int(tensor.count_nonzero()),
            bytes=tensor.nbytes,
        )


def _files(folder: Path) -> dict[str, Any]:
    """Open the adapter's files, and return the open file of each tensor: name of a tensor -> file.

    There are one or two files: ``WEIGHTS`` and, in some exports of this project, ``APART``, which
    holds the modules trained in full.

    Raises:
        UserError: if ``WEIGHTS`` is missing.
    """
    weights, apart = folder / WEIGHTS, folder / APART
    if not weights.exists():
        raise UserError(
            f"{folder} has no {WEIGHTS}, the only weight file that can be read. Save the "
            "adapter in the safetensors format."
        )
    there = [safe_open(str(path), framework="pt") for path in (weights, apart) if path.exists()]
    return {key: file for file in there for key in file.keys()}  # noqa: SIM118  safe_open is no dict


def _sorted(keys: list[str]) -> tuple[dict[str, dict[str, str]], list[str]]:
    """Split the names of tensors into pairs of factors A and B, and others.

    Args:
        keys: names of all tensors of the adapter, as in its files.

    Returns:
        The pairs, as {module: {"A": name of its tensor A, "B": name of its tensor B}}, and a list
        of the names of all other tensors. A or B is left out of a pair if the adapter lacks it.
    """
    pairs: dict[str, dict[str, str]] = {}
    full = []
    for key in sorted(keys, key=_in_order):
        match = FACTOR.fullmatch(key.removeprefix(PREFIX))
        if match is None:
            full.append(key)
        else:
            pairs.setdefault(match["module"], {})[match["factor"]] = key
    return pairs, full


def _in_order(key: str) -> list[tuple[int, str]]:
    """Return a sort key for the name of a tensor that puts layer 10 after layer 9."""
    return [(int(word), "") if word.isdecimal() else (-1, word) for word in key.split(".")]


def _of_pair(
    files: Mapping[str, Any], name: str, pair: Mapping[str, str], config: Mapping[str, Any]
) -> Module:
    """Read the factors A and B of a module, and return the module's row of the table.

    Args:
        files: open file of each tensor, by the tensor's name.
        name: name of the module.
        pair: names of its two tensors, {"A": ..., "B": ...}.
        config: content of adapter_config.json.
    """
    stored = [files[pair[factor]].get_tensor(pair[factor]) for factor in "AB"]
    # flatten, because the factors of convolutions have more than two axes.
    a_RI, b_OR = (t.flatten(1).double() for t in stored)
    if not a_RI.numel():
        raise UserError(
            f"The A of {name} has shape {list(stored[0].shape)}, without an entry. Export the "
            "adapter again."
        )
    in_use = a_RI.any(dim=1) & b_OR.any(dim=0)
    return Module(
        name=name,
        rank=int(in_use.sum()),
        capacity=len(a_RI),
        entries=a_RI.numel() + b_OR.numel(),
        alive=int(a_RI.count_nonzero() + b_OR.count_nonzero()),
        bytes=sum(t.nbytes for t in stored),
        norm=LowRank(a_LI=a_RI, b_OL=b_OR, scale=scale_of(config, name, len(a_RI))).norm,
    )
