"""Writing a checkpoint: every rank its slices, then rank 0 the manifest and the name."""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from sparse_lora_dist import comm, run_lock, watch
from sparse_lora_dist.checkpoint.manifest import (
    FORMAT,
    MANIFEST,
    PACKED,
    Progress,
    hash_of_file,
    sealed,
)
from sparse_lora_dist.checkpoint.recover import REPLACED, TEMPORARY
from sparse_lora_dist.shards import Shards


def save(
    folder: Path,
    shards: Shards,
    progress: Progress,
    *,
    description: Mapping[str, Any],
    total_steps: int,
    config: Mapping[str, object],
    held_out_loss: float | None,
) -> Path:
    """Write and publish ``folder/step_N``; return it. Collective.

    Every rank writes and syncs its file into a temporary directory; rank 0 writes the manifest last
    and renames the directory, so that what carries the final name is complete.

    Args:
        description: what a resume must agree with (base, method, seed ...).
        total_steps: where the schedules of this run end; a resume may change it, and then says so.
        config: the merged config.
        held_out_loss: of this step, where it was taken.
    """
    watch.mark("saving")
    final = folder / f"step_{progress.step:08d}"
    temporary = folder / f"{TEMPORARY}step_{progress.step:08d}"
    with comm.together(f"preparing {temporary}"):
        if comm.rank() == 0:
            run_lock.check()
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
    with comm.together(f"writing {temporary}"):
        about = _write_own(temporary / f"rank_{comm.rank():05d}.safetensors", shards)
    files = comm.gather_objects(about)
    with comm.together(f"publishing {final}"):
        if comm.rank() == 0:
            manifest = {
                "format": FORMAT,
                "progress": asdict(progress),
                "world_size": comm.world_size(),
                "tensors": {p.name: list(p.shape) for p in shards.engine.slices},
                "description": dict(description),
                "total_steps": total_steps,
                "config": dict(config),
                "held_out_loss": held_out_loss,
                "sites": shards.sites.as_json(),
                "facts": dict(shards.facts),
                "ended": shards.ended,
                "files": files,
            }
            _publish(temporary, final, manifest)
    return final


def _write_own(path: Path, shards: Shards) -> dict[str, Any]:
    """Write this rank's slices; return the file's name, size and hash."""
    tensors: dict[str, Tensor] = {"rng/cpu": torch.get_rng_state()}
    if comm.on_gpu():
        tensors["rng/cuda"] = torch.cuda.get_rng_state()
    live = shards.live()
    offsets = {p.name: [p.start, p.length] for p in shards.engine.slices}
    for piece in shards.engine.slices:
        tensors[f"master/{piece.name}"] = shards.engine.master(piece)
        tensors[f"live/{piece.name}"] = live[piece.name]
        # Of all entries: what is dead may come back, and its average goes on meanwhile.
        stats = shards.stats.get(piece.name, ())
        tensors |= {f"stat{i}/{piece.name}": stat for i, stat in enumerate(stats)}
    # A clone each: safetensors refuses views that share storage.
    own = {key: t.cpu().clone() for key, t in tensors.items()}
    # One after the other: spread out over the dead, each is as large as the masters.
    for key in PACKED:
        spread = shards.born() if key == "born" else shards.moments(key)
        own |= {f"{key}/{name}": t[live[name]].cpu() for name, t in spread.items()}
    save_file(own, path, metadata={"offsets": json.dumps(offsets)})
    _sync(path)
    return {"name": path.name, "bytes": path.stat().st_size, "sha256": hash_of_file(path)}


def _publish(temporary: Path, final: Path, manifest: Mapping[str, Any]) -> None:
    (temporary / MANIFEST).write_text(sealed(manifest))
    _sync(temporary / MANIFEST)
    _sync(temporary)
    run_lock.check()  # a job that was suspended may have been given up, and its folder taken
    replaced = final.with_name(f"{REPLACED}{final.name}")
    if final.exists():  # saved by an earlier attempt: gone only once the new one stands
        os.rename(final, replaced)
    os.rename(temporary, final)
    _sync(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _sync(path: Path) -> None:
    """Have the disk take it, or a crash after the rename could leave a name without its bytes."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
