"""Reading a checkpoint: each rank the ranges it owns, from whichever files hold them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sparse_lora_dist import comm
from sparse_lora_dist.checkpoint.manifest import Progress
from sparse_lora_dist.errors import UserError
from sparse_lora_dist.optim import MOMENTS
from sparse_lora_dist.shards import Shards
from sparse_lora_dist.zero3 import Slice


def restore(checkpoint: Path, shards: Shards, manifest: Mapping[str, Any]) -> Progress:
    """Put masters, moments, masks, statistics and random states back; return how far the run was.
    Collective."""
    progress = Progress(**manifest["progress"])
    with comm.together(f"reading {checkpoint}"):
        _check_tensors(checkpoint, manifest["tensors"], shards)
        reader = _Reader(checkpoint, [file["name"] for file in manifest["files"]])
        pieces = shards.engine.slices
        for piece in pieces:
            shards.engine.master(piece).copy_(reader.dense("master", piece))
        live = {p.name: reader.dense("live", p) for p in pieces}
        shards.restore(
            live,
            {key: {p.name: reader.dense(key, p) for p in pieces} for key in MOMENTS},
            progress.step,
        )
        for piece in shards.sparse:
            count = len(shards.stats[piece.name])
            device = shards.engine.master(piece).device
            shards.stats[piece.name] = tuple(
                reader.dense(f"stat{i}", piece).to(device) for i in range(count)
            )
        if manifest["world_size"] == comm.world_size():
            reader.restore_random_states()
    shards.engine.masters_changed()
    return progress


def _check_tensors(checkpoint: Path, saved: Mapping[str, list[int]], shards: Shards) -> None:
    now = {p.name: list(p.shape) for p in shards.engine.slices}
    if saved != now:
        differ = sorted(n for n in {*saved, *now} if saved.get(n) != now.get(n))
        raise UserError(
            f"{checkpoint}: {len(differ)} trained tensors differ, the first is {differ[0]}: "
            f"saved {saved.get(differ[0])}, now {now.get(differ[0])}. "
            "Resume with the saved --rank, --target_modules and --modules_to_save."
        )


class _Reader:
    """Ranges of tensors from whichever rank files hold them."""

    def __init__(self, checkpoint: Path, names: list[str]) -> None:
        try:
            self.files = [safe_open(str(checkpoint / name), framework="pt") for name in names]
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"{checkpoint} cannot be read: {error}. Resume from another step."
            ) from error
        self.offsets = [json.loads(f.metadata()["offsets"]) for f in self.files]

    def dense(self, key: str, piece: Slice) -> Tensor:
        """Entries [start, start + length) of ``key`` of a tensor, zero where nothing lives."""
        out: Tensor | None = None
        for file, offsets in zip(self.files, self.offsets, strict=True):
            start, length = offsets[piece.name]
            first, last = max(start, piece.start), min(start + length, piece.start + piece.length)
            saved = file.get_tensor(f"{key}/{piece.name}")
            if key not in ("master", "live"):
                mask = file.get_tensor(f"live/{piece.name}")
                saved = torch.zeros(length, dtype=saved.dtype).masked_scatter_(mask, saved)
            out = torch.zeros(piece.length, dtype=saved.dtype) if out is None else out
            if first < last:
                out[first - piece.start : last - piece.start] = saved[first - start : last - start]
        assert out is not None
        return out

    def restore_random_states(self) -> None:
        file = self.files[comm.rank()]
        torch.set_rng_state(file.get_tensor("rng/cpu"))
        if torch.cuda.is_available() and "rng/cuda" in file.keys():  # noqa: SIM118  safe_open is no dict
            torch.cuda.set_rng_state(file.get_tensor("rng/cuda"))
