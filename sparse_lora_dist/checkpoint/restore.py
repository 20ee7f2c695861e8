"""Reading a checkpoint: each rank the ranges it owns, from whichever files hold them."""

import json
from collections.abc import Mapping, Set
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from sparse_lora_dist import comm
from sparse_lora_dist.checkpoint.manifest import PACKED, Progress
from sparse_lora_dist.optim import MOMENTS
from sparse_lora_dist.phases import together
from sparse_lora_dist.shards import Shards
from sparse_lora_dist.zero3 import Slice

DTYPES = {"live": torch.bool, "born": torch.int32}


def restore(
    checkpoint: Path, shards: Shards, manifest: Mapping[str, Any], reset: Set[str]
) -> Progress:
    """Put everything back that was saved, but for what is ``reset``; return how far the run is. Its
    files were checked before (``recover``). Collective."""
    progress = Progress(**manifest["progress"])
    if "schedule" in reset:
        progress = replace(progress, step=0, tokens=0)
    if "data" in reset:
        progress = replace(progress, rows=0)
    with together(f"reading {checkpoint}"):
        reader = _Reader(checkpoint, [file["name"] for file in manifest["files"]])
        pieces = shards.engine.slices
        for piece in pieces:
            shards.engine.master(piece).copy_(reader.dense("master", piece))
        shards.restore(
            {p.name: reader.dense("live", p) for p in pieces},
            {key: {p.name: reader.dense(key, p) for p in pieces} for key in MOMENTS},
            {p.name: reader.dense("born", p) for p in pieces},
            progress.step,
        )
        # Ages of moments are steps of the schedule.
        if reset & {"optimizer", "schedule"}:
            shards.optimizer.reset_moments()
        shards.sites.restore(manifest["sites"])
        shards.facts = manifest["facts"]
        if manifest["ended"]:
            shards.end()
        for name, stats in shards.stats.items():
            piece, device = shards.sparse[name], shards.engine.master(shards.sparse[name]).device
            shards.stats[name] = tuple(
                reader.dense(f"stat{i}", piece).to(device) for i in range(len(stats))
            )
        if manifest["world_size"] == comm.world_size():
            reader.restore_random_states()
    shards.engine.masters_changed()
    return progress


class _Reader:
    """Ranges of tensors from whichever rank files hold them; nothing else is read."""

    def __init__(self, checkpoint: Path, names: list[str]) -> None:
        self.files = [safe_open(str(checkpoint / name), framework="pt") for name in names]
        self.offsets = [json.loads(f.metadata()["offsets"]) for f in self.files]

    def dense(self, key: str, piece: Slice) -> Tensor:
        """Entries [start, start + length) of ``key`` of a tensor, zero where nothing lives."""
        out = torch.zeros(piece.length, dtype=DTYPES.get(key, torch.float32))
        for file, offsets in zip(self.files, self.offsets, strict=True):
            start, length = offsets[piece.name]
            first = max(start, piece.start)
            last = min(start + length, piece.start + piece.length)
            if first < last:
                part = _entries(file, key, piece.name, first - start, last - start)
                out[first - piece.start : last - piece.start] = part
        return out

    def restore_random_states(self) -> None:
        file = self.files[comm.rank()]
        torch.set_rng_state(file.get_tensor("rng/cpu"))
        if comm.on_gpu() and "rng/cuda" in file.keys():  # noqa: SIM118  safe_open is no dict
            torch.cuda.set_rng_state(file.get_tensor("rng/cuda"))


def _entries(file: Any, key: str, name: str, first: int, last: int) -> Tensor:
    """Entries [first, last) of what one rank saved, counted from its own start."""
    saved = file.get_slice(f"{key}/{name}")
    if key not in PACKED:
        return saved[first:last]  # type: ignore[no-any-return]
    live = file.get_slice(f"live/{name}")[:last]
    packed: Tensor = saved[int(live[:first].sum()) : int(live.sum())]
    return packed.new_zeros(last - first).masked_scatter_(live[first:], packed)
