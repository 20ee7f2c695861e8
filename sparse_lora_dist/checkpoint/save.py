"""Save a checkpoint: every rank writes a file of its slices, then rank 0 publishes the folder.

Training waits only until the slices are copied to host memory. Then a thread writes them to a
temporary folder while training goes on. At the first step after which every rank's file is on disk,
rank 0 writes the manifest and renames the folder to step_N. This publishes the checkpoint.
"""

import json
import shutil
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from sparse_lora_dist.base_model.nf4_shard import own_bytes
from sparse_lora_dist.checkpoint.manifest import (
    FORMAT,
    MANIFEST,
    PACKED,
    Progress,
    hash_of_file,
    sealed,
)
from sparse_lora_dist.checkpoint.recover import LATEST
from sparse_lora_dist.distributed import comm
from sparse_lora_dist.distributed.phases import fail_together
from sparse_lora_dist.errors import UserError
from sparse_lora_dist.methods.shared.bit_masks import pack_bits
from sparse_lora_dist.run_folder import lock as run_lock
from sparse_lora_dist.run_folder.metrics_log import own_peak_memory_bytes
from sparse_lora_dist.runtime import watchdog
from sparse_lora_dist.sparsity.shards import Shards
from sparse_lora_dist.system.atomic_files import TEMPORARY, put_in_place, sync, write_whole
from sparse_lora_dist.zero3.parameters import own_share
from sparse_lora_dist.zero3.shares import own_range


@dataclass(frozen=True, kw_only=True)
class _Writing:
    """A checkpoint that is being written and is not published yet."""

    final: Path
    temporary: Path
    manifest: Mapping[str, Any]
    file: Future[tuple[dict[str, Any], float]]
    copied_s: float


class Saver:
    """Saves the checkpoints of a run, one at a time. Every method is a collective.

    Args:
        folder: the "checkpoints" folder of the run.
        beside: True to write in the background while training goes on.
    """

    def __init__(self, folder: Path, *, beside: bool) -> None:
        self.folder, self.beside = folder, beside
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._writing: _Writing | None = None
        self.took_s = 0.0
        """Seconds that the last save took to copy, write and publish, without the training steps in
        between. The run stops that long before its time limit, to save once more."""

    def begin(self, shards: Shards, progress: Progress, about: Mapping[str, Any]) -> Path | None:
        """Copy the present state and start to write it as ``folder/step_N``. Collective.

        ``poll`` or ``finish`` must have published the save before it.

        Args:
            shards: this rank's shards.
            progress: progress of the run; its step names the checkpoint.
            about: further entries of the manifest: description, config, total_steps ...

        Returns:
            None, since the checkpoint is written in the background; its folder if ``beside`` is
            False, after it was published.

        Raises:
            UserError: on all ranks, if any rank cannot write.
        """
        earlier = self.finish()
        assert earlier is None, "call poll or finish before the next save"
        watchdog.set_phase("saving")
        began = time.perf_counter()
        name = f"step_{progress.step:08d}"
        temporary = self.folder / f"{TEMPORARY}{name}"
        with fail_together(f"preparing {temporary}"):
            if comm.rank() == 0:
                run_lock.check()
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir(parents=True)
        manifest = {
            "format": FORMAT,
            "progress": asdict(progress),
            "world_size": comm.world_size(),
            "tensors": {p.name: list(p.shape) for p in shards.engine.slices},
            "sites": shards.sites.as_json(),
            "facts": dict(shards.log_values),
            "ended": shards.ended,
            **about,
        }
        path = temporary / f"rank_{comm.rank():05d}.safetensors"
        own = _copied_to_host(shards)
        copied_s = time.perf_counter() - began
        file = self._thread.submit(_write, path, *own)
        self._writing = _Writing(
            final=self.folder / name,
            temporary=temporary,
            manifest=manifest,
            file=file,
            copied_s=copied_s,
        )
        return None if self.beside else self.finish()

    def poll(self) -> Path | None:
        """Publish the checkpoint that is being written, if every rank's file is on disk.

        Does not wait. Collective.

        Returns:
            Folder of the checkpoint that this call published; None if it published none.
        """
        if self._writing is None or comm.largest(int(not self._writing.file.done())):
            return None
        return self.finish()

    def finish(self) -> Path | None:
        """Wait for the checkpoint that is being written, and publish it. Collective.

        Returns:
            Folder of the checkpoint that this call published; None if none was being written.

        Raises:
            UserError: on all ranks, if any rank could not write its file.
        """
        if self._writing is None:
            return None
        now, self._writing = self._writing, None
        watchdog.set_phase("publishing a checkpoint", may_be_long=True)  # a slow disk is not a hang
        began = time.perf_counter()
        try:
            with fail_together(f"writing {now.temporary}"):
                own, seconds = now.file.result()
            own["peak_memory_bytes"] = own_peak_memory_bytes()
            files, written_s = zip(*comm.gather_objects((own, seconds)), strict=True)
            with fail_together(f"publishing {now.final}"):
                if comm.rank() == 0:
                    manifest = {**now.manifest, "files": files, "time": time.time()}
                    _publish(now.temporary, now.final, manifest)
        except UserError:  # most often a full disk: remove the unfinished files
            if run_lock.is_ours():  # on rank 0; another job may have taken the folder over
                shutil.rmtree(now.temporary, ignore_errors=True)
            raise
        # Not the time since ``begin``: steps may lie between, which are no part of saving.
        self.took_s = now.copied_s + max(written_s) + time.perf_counter() - began
        return now.final


def _copied_to_host(shards: Shards) -> tuple[dict[str, Tensor], dict[str, list[int]]]:
    """Copy this rank's slices to host memory, where training does not change them.

    Returns:
        A tuple of two: key in the file -> tensor to save, on the CPU; tensor name -> [first entry,
        number of entries] of this rank's slice.
    """
    tensors: dict[str, Tensor] = {"rng/cpu": torch.get_rng_state()}
    if comm.on_gpu():
        tensors["rng/cuda"] = torch.cuda.get_rng_state()
    live = shards.live()
    offsets = {p.name: [p.start, p.length] for p in shards.engine.slices}
    for tensor_slice in shards.engine.slices:
        tensors[f"master/{tensor_slice.name}"] = shards.engine.master(tensor_slice)
        tensors[f"live/{tensor_slice.name}"] = pack_bits(live[tensor_slice.name])
        # For all entries: a dead one may come to life again, and its statistics go on meanwhile.
        stats = shards.stats.get(tensor_slice.name, ())
        tensors |= {f"stat{i}/{tensor_slice.name}": stat for i, stat in enumerate(stats)}
    tensors |= _own_parts_of_sites(shards, offsets)
    # Copy each: safetensors refuses views that share storage.
    own = {key: t.to("cpu", copy=True) for key, t in tensors.items()}
    # One key at a time: unpacked to all entries, each is as large as the masters.
    for key in PACKED:
        spread = shards.born() if key == "born" else shards.moments(key)
        packed = {f"{key}/{name}": _packed(t, live[name]) for name, t in spread.items()}
        own |= {k: _one_if_all_equal(t) for k, t in packed.items()} if key == "born" else packed
    return own, offsets


def _own_parts_of_sites(shards: Shards, offsets: dict[str, list[int]]) -> dict[str, Tensor]:
    """Return this rank's slices of the kept tensors and of the sites' means of squared inputs.

    Args:
        shards: this rank's shards.
        offsets: tensor name -> [first entry, number of entries] of this rank's slice. An item is
            added for each kept tensor (its entries are bytes) and each site.

    Returns:
        "kept/NAME" -> uint8, 1-D; "squares/SITE" -> float64, 1-D.
    """
    own = {}
    for name, (parameter, spec) in shards.sites.kept().items():
        raw = own_share(parameter).view(torch.uint8)
        first, last = own_bytes(spec.num_bytes, parameter.dtype)
        own[f"kept/{name}"], offsets[name] = raw[: last - first], [first, last - first]
    for name, squares_I in shards.sites.squares.items():
        first, last = own_range(len(squares_I))
        own[f"squares/{name}"], offsets[name] = squares_I[first:last], [first, last - first]
    return own


def _packed(spread_N: Tensor, live_N: Tensor) -> Tensor:
    """Copy the live entries of a slice to the CPU, 1-D.

    Args:
        spread_N: values of all entries of the slice, live and dead.
        live_N: mask of the live entries, bool.
    """
    # Picking all entries by a mask takes five times as long as copying them.
    return spread_N.to("cpu", copy=True) if live_N.all() else spread_N[live_N].cpu()


def _one_if_all_equal(births_L: Tensor) -> Tensor:
    """Return the first birth step alone, [1], if all are equal (the usual case), else the input."""
    return births_L[:1].clone() if (births_L == births_L[:1]).all() else births_L


def _write(
    path: Path, own: dict[str, Tensor], offsets: Mapping[str, list[int]]
) -> tuple[dict[str, Any], float]:
    """Write a rank's file and wait until it is on disk. Runs in the thread.

    Args:
        path: the file to write.
        own: key -> tensor to save, on the CPU.
        offsets: tensor name -> [first entry, number of entries] of this rank's slice, for the
            file's metadata.

    Returns:
        A tuple of two: the file's entry in the manifest (name, size in bytes, sha256 hash); the
        seconds that writing took.
    """
    began = time.perf_counter()
    save_file(own, path, metadata={"offsets": json.dumps(offsets)})
    sync(path)
    about = {"name": path.name, "bytes": path.stat().st_size, "sha256": hash_of_file(path)}
    return about, time.perf_counter() - began


def _publish(temporary: Path, final: Path, manifest: Mapping[str, Any]) -> None:
    (temporary / MANIFEST).write_text(sealed(manifest))
    sync(temporary / MANIFEST)
    sync(temporary)
    run_lock.check()  # if this job was suspended, another may have taken its folder over
    put_in_place(temporary, final)  # replaces this step if an earlier attempt saved it
    # For people and scripts; a resume looks at the folders.
    write_whole(final.parent / LATEST, f"{final.name}\n")
