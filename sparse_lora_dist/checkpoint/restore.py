"""Restore training state from a checkpoint, on any number of ranks.

Each rank reads the entries of the tensors that it holds now, from the files of any rank.
"""

from collections.abc import Callable, Mapping, Set
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparse_lora_dist.checkpoint.manifest import Progress
from sparse_lora_dist.checkpoint.saved_slices import SavedSlices
from sparse_lora_dist.distributed import comm
from sparse_lora_dist.distributed.phases import fail_together
from sparse_lora_dist.optim.moments import MOMENTS
from sparse_lora_dist.sparsity.shards import Shards
from sparse_lora_dist.zero3.slices import TensorSlice


def restore(
    checkpoint: Path, shards: Shards, manifest: Mapping[str, Any], reset: Set[str]
) -> Progress:
    """Set the training state of a run to that of a checkpoint. Collective.

    The states of the random generators are restored only if the run has as many ranks as the one
    that saved them.

    Args:
        checkpoint: a step_... folder, whose files ``find_damage`` has checked.
        shards: this rank's shards of the trained tensors. Changed in place, with the engine, the
            optimizer and the adapters that they belong to.
        manifest: what ``read_manifest`` returned for the checkpoint.
        reset: names of the parts that start anew instead of being restored: "optimizer" (moments),
            "schedule" (step count, token count and moments) and "data" (position in the data).

    Returns:
        Steps, rows and tokens done at the checkpoint, with those of the reset parts at zero.

    Raises:
        UserError: on all ranks, if any rank cannot read a file.
    """
    progress = _progress_after_reset(Progress(**manifest["progress"]), reset)
    with fail_together(f"reading {checkpoint}"):
        saved = SavedSlices.of(checkpoint, manifest)
        slices = shards.engine.slices

        def own(key: str, tensor_slice: TensorSlice) -> Tensor:
            return saved.entries(
                key, tensor_slice.name, tensor_slice.start, tensor_slice.start + tensor_slice.length
            )

        for tensor_slice in slices:
            shards.engine.master(tensor_slice).copy_(own("master", tensor_slice))
        shards.restore(
            {p.name: own("live", p) for p in slices},
            {key: {p.name: own(key, p) for p in slices} for key in MOMENTS},
            {p.name: own("born", p) for p in slices},
            progress.step,
        )
        # Birth steps are steps of the schedule, so a new schedule needs new moments.
        if reset & {"optimizer", "schedule"}:
            shards.reset_moments()
        shards.sites.restore(manifest["sites"])
        shards.log_values = manifest["facts"]
        if manifest["ended"]:
            shards.free_statistics()
        _restore_statistics(shards, own)
        kept = {
            name: saved.entries("kept", name, *shards.sites.own_kept_bytes(spec))
            for name, (_, spec) in shards.sites.kept().items()
        }
        for name, squares_I in shards.sites.squares.items():
            squares_I.copy_(saved.entries("squares", name, 0, len(squares_I)))
        if manifest["world_size"] == comm.world_size():
            _restore_random_states(saved.files[comm.rank()])
    # Collective under hpZ, so it must come after the phase in which a rank may fail to read.
    for name, (parameter, _) in shards.sites.kept().items():
        shards.sites.fill_kept(parameter, kept.pop(name))
    shards.engine.masters_changed()
    return progress


def _progress_after_reset(progress: Progress, reset: Set[str]) -> Progress:
    if "schedule" in reset:
        progress = replace(progress, step=0, tokens=0)
    if "data" in reset:
        progress = replace(progress, rows=0)
    return progress


def _restore_statistics(shards: Shards, own: Callable[[str, TensorSlice], Tensor]) -> None:
    for name, stats in shards.stats.items():
        tensor_slice = shards.sparse[name]
        device = shards.engine.master(tensor_slice).device
        shards.stats[name] = tuple(
            own(f"stat{i}", tensor_slice).to(device) for i in range(len(stats))
        )


def _restore_random_states(own: Any) -> None:
    torch.set_rng_state(own.get_tensor("rng/cpu"))
    if comm.on_gpu() and "rng/cuda" in own.keys():  # noqa: SIM118  safe_open is no dict
        torch.cuda.set_rng_state(own.get_tensor("rng/cuda"))
