"""Reading a checkpoint: each rank the ranges it owns, from whichever files hold them."""

from collections.abc import Mapping, Set
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparse_lora_dist.checkpoint.manifest import Progress
from sparse_lora_dist.checkpoint.saved_slices import SavedSlices
from sparse_lora_dist.distributed import comm
from sparse_lora_dist.distributed.phases import together
from sparse_lora_dist.optim.moments import MOMENTS
from sparse_lora_dist.sparsity.shards import Shards
from sparse_lora_dist.zero3.shares import Slice


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
        saved = SavedSlices.of(checkpoint, manifest)
        pieces = shards.engine.slices

        def own(key: str, piece: Slice) -> Tensor:
            return saved.entries(key, piece.name, piece.start, piece.start + piece.length)

        for piece in pieces:
            shards.engine.master(piece).copy_(own("master", piece))
        shards.restore(
            {p.name: own("live", p) for p in pieces},
            {key: {p.name: own(key, p) for p in pieces} for key in MOMENTS},
            {p.name: own("born", p) for p in pieces},
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
            shards.stats[name] = tuple(own(f"stat{i}", piece).to(device) for i in range(len(stats)))
        kept = {
            name: saved.entries("kept", name, *shards.sites.own_kept(spec))
            for name, (_, spec) in shards.sites.kept().items()
        }
        for name, squares_I in shards.sites.squares.items():
            squares_I.copy_(saved.entries("squares", name, 0, len(squares_I)))
        if manifest["world_size"] == comm.world_size():
            _restore_random_states(saved.files[comm.rank()])
    # Collective under hpZ, so not while another rank may have failed to read.
    for name, (parameter, _) in shards.sites.kept().items():
        shards.sites.fill_kept(parameter, kept.pop(name))
    shards.engine.masters_changed()
    return progress


def _restore_random_states(own: Any) -> None:
    torch.set_rng_state(own.get_tensor("rng/cpu"))
    if comm.on_gpu() and "rng/cuda" in own.keys():  # noqa: SIM118  safe_open is no dict
        torch.cuda.set_rng_state(own.get_tensor("rng/cuda"))
