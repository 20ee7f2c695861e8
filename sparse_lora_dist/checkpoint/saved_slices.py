"""The tensors of a checkpoint, by ranges, from whichever rank files hold them."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from sparse_lora_dist.checkpoint.manifest import PACKED
from sparse_lora_dist.methods.shared.bit_masks import unpack_bits

DTYPES = {
    "live": torch.bool,
    "born": torch.int32,
    "kept": torch.uint8,
    "squares": torch.float64,
}


class SavedSlices:
    """Reads what is asked for and nothing else."""

    def __init__(self, checkpoint: Path, files: Iterable[str]) -> None:
        self.files = [safe_open(str(checkpoint / name), framework="pt") for name in files]
        self.offsets = [json.loads(f.metadata()["offsets"]) for f in self.files]

    @classmethod
    def of(cls, checkpoint: Path, manifest: Mapping[str, Any]) -> "SavedSlices":
        """All that its manifest names."""
        return cls(checkpoint, [file["name"] for file in manifest["files"]])

    def entries(self, key: str, name: str, first: int, last: int) -> Tensor:
        """Entries [first, last) of ``key`` of a tensor, flattened; zero where nothing lives."""
        out = torch.zeros(last - first, dtype=DTYPES.get(key, torch.float32))
        for file, offsets in zip(self.files, self.offsets, strict=True):
            start, length = offsets[name]
            since, until = max(start, first), min(start + length, last)
            if since < until:
                part = _entries(file, key, name, since - start, until - start)
                out[since - first : until - first] = part
        return out


def _entries(file: Any, key: str, name: str, first: int, last: int) -> Tensor:
    """Entries [first, last) of what one rank saved, counted from its own start."""
    if key not in (*PACKED, "live"):
        return file.get_slice(f"{key}/{name}")[first:last]  # type: ignore[no-any-return]
    live = unpack_bits(file.get_slice(f"live/{name}")[: -(-last // 8)], last)
    if key == "live":
        return live[first:]
    before, count = int(live[:first].sum()), int(live[first:].sum())
    saved = file.get_slice(f"{key}/{name}")
    if key == "born" and saved.get_shape() == [1]:
        packed = saved[:].expand(count)
    else:
        packed = saved[before : before + count]
    spread: Tensor = packed.new_zeros(last - first).masked_scatter_(live[first:], packed)
    return spread
