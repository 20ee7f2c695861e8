"""The modules of a PEFT LoRA adapter, ours or anyone's.

Shapes: I in_features, O out_features, R rank.
"""

import json
import re
from collections.abc import Iterator, Mapping
from math import sqrt
from pathlib import Path
from typing import Any

from safetensors import safe_open

from sparse_lora_dist.errors import UserError
from sparse_lora_dist.export.peft_adapter import CONFIG, PREFIX, WEIGHTS
from sparse_lora_dist.show.table import Module, norm_of

FACTOR = re.compile(r"(?P<module>.+)\.lora_(?:embedding_)?(?P<factor>[AB])(\.weight)?")


def head(folder: Path, config: Mapping[str, Any]) -> str:
    """What it says of itself."""
    return (
        f"adapter   {folder}: LoRA of rank {config.get('r')}, alpha {config.get('lora_alpha')}, "
        f"for {config.get('base_model_name_or_path')}"
    )


def read_config(folder: Path) -> dict[str, Any]:
    """adapter_config.json.

    Raises:
        UserError: it is damaged, or not of a LoRA whose update is B A.
    """
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA" or config.get("use_dora"):
        raise UserError(f"{path} is not of a plain LoRA adapter, which is what can be shown.")
    return config


def modules(folder: Path, config: Mapping[str, Any]) -> Iterator[Module]:
    """Each with its numbers, one read at a time; what was trained in full comes last."""
    path = folder / WEIGHTS
    if not path.exists():
        raise UserError(f"{folder} has no {WEIGHTS}; other files of weights are not read.")
    with safe_open(str(path), framework="pt") as file:
        pairs, full = _sorted(list(file.keys()))
        for name, pair in pairs.items():
            if set(pair) != {"A", "B"}:
                raise UserError(f"{path} is damaged: {name} has lora_{min(pair)} only.")
            yield _of_pair(file, name, pair, config)
        for key in full:
            tensor = file.get_tensor(key)
            yield Module(
                name=key.removeprefix(PREFIX),
                entries=tensor.numel(),
                alive=int(tensor.count_nonzero()),
                bytes=tensor.nbytes,
            )


def _sorted(keys: list[str]) -> tuple[dict[str, dict[str, str]], list[str]]:
    """{module: {"A": key, "B": key}}, and keys of other tensors."""
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
    """Layer 10 after layer 9."""
    return [(int(word), "") if word.isdecimal() else (-1, word) for word in key.split(".")]


def _of_pair(file: Any, name: str, pair: Mapping[str, str], config: Mapping[str, Any]) -> Module:
    stored = [file.get_tensor(pair[factor]) for factor in "AB"]
    # Of convolutions too, whose factors have more than two axes.
    a_RI, b_OR = (t.flatten(1).double() for t in stored)
    in_use = a_RI.any(dim=1) & b_OR.any(dim=0)
    return Module(
        name=name,
        rank=int(in_use.sum()),
        capacity=len(a_RI),
        entries=a_RI.numel() + b_OR.numel(),
        alive=int(a_RI.count_nonzero() + b_OR.count_nonzero()),
        bytes=sum(t.nbytes for t in stored),
        norm=norm_of(a_RI, b_OR, _scale(name, len(a_RI), config)),
    )


def _scale(name: str, rank: int, config: Mapping[str, Any]) -> float:
    """alpha / R, where the module may have an alpha of its own."""
    patterns = config.get("alpha_pattern") or {}
    own = (alpha for key, alpha in patterns.items() if re.fullmatch(rf"(.*\.)?({key})", name))
    alpha = next(own, config["lora_alpha"])
    return float(alpha) / (sqrt(rank) if config.get("use_rslora") else rank)
