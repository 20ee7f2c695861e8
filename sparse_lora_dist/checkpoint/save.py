"""Save a checkpoint: every rank writes a file of its slices, then rank 0 publishes the folder.

A slice is the range of a trained tensor's entries that one rank holds. Saving has three parts:

1. Each rank copies its slices to host memory. Training waits only for this.
2. A thread of each rank writes them to a temporary folder while training goes on.
3. At the end of the first step at which every rank's file is on disk, rank 0 writes the manifest
   and renames the folder to step_N. This publishes the checkpoint.
"""

import json
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
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
from sparse_lora_dist.checkpoint.own_files import LATEST, may_be_own, own_files, set_aside
from sparse_lora_dist.distributed import comm
from sparse_lora_dist.distributed.console import print_line
from sparse_lora_dist.distributed.device import on_host
from sparse_lora_dist.distributed.phases import fail_together
from sparse_lora_dist.errors import UserError
from sparse_lora_dist.methods.shared.bit_masks import pack_bits
from sparse_lora_dist.run_folder import lock as run_lock
from sparse_lora_dist.run_folder.metrics_log import own_peak_memory_bytes
from sparse_lora_dist.runtime import watchdog
from sparse_lora_dist.sparsity.shards import Shards
from sparse_lora_dist.system.atomic_files import beside, sync, write_whole
from sparse_lora_dist.system.own_files import claim, remove_own
from sparse_lora_dist.system.tensor_files import save_file
from sparse_lora_dist.system.whole_folders import put_in_place
from sparse_lora_dist.zero3.parameters import own_share
from sparse_lora_dist.zero3.slices import own_range


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

    ``begin`` starts a save, ``poll`` is called after each step, and ``finish`` waits for the end.

    Args:
        folder: the "checkpoints" folder of the run.
        beside: True to write in the background while training goes on. False: ``begin`` returns
            after the checkpoint was published.
    """

    def __init__(self, folder: Path, *, beside: bool) -> None:
        self.folder, self.beside = folder, beside
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._writing: _Writing | None = None
        self.took_s = 0.0
        """Seconds that the last save took to copy, write and publish, without the training steps in
        between; 0.0 before the first save. ``--time_limit`` reserves twice the longest such time
        for the last checkpoint."""

    def begin(self, shards: Shards, progress: Progress, about: Mapping[str, Any]) -> Path | None:
        """Copy the present state and start to write it as ``folder/step_N``. Collective.

        An earlier checkpoint must be published before this call, which ``poll`` or ``finish`` does.

        Args:
            shards: this rank's shards of the trained tensors.
            progress: steps, rows and tokens done; the number of steps names the checkpoint.
            about: further entries of the manifest, JSON values by name: description, config,
                total_steps ...

        Returns:
            If ``beside`` is True, None: the checkpoint is still being written. Otherwise its
            folder: it is published.

        Raises:
            UserError: on all ranks, if any rank cannot write.
        """
        earlier = self.finish()
        assert earlier is None, "call poll or finish before the next save"
        watchdog.set_phase("saving")
        began = time.perf_counter()
        name = f"step_{progress.step:08d}"
        temporary: Path = comm.broadcast_object(beside(self.folder / name))
        with fail_together(f"preparing {temporary}", may_pass=True):
            if comm.rank() == 0:
                run_lock.check()
                self.folder.mkdir(parents=True, exist_ok=True)  # so: claimed and gone is removed
                claim(self.folder.parent, self.folder.name)
                temporary.mkdir()
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

        Called after each step. Does not wait for files. Collective.

        Returns:
            Folder of the checkpoint that this call published; None if it published none.
        """
        if self._writing is None or comm.largest(int(not self._writing.file.done())):
            return None
        return self.finish()

    def finish(self) -> Path | None:
        """Wait until the checkpoint that is being written is on disk, and publish it. Collective.

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
            with fail_together(f"writing {now.temporary}", may_pass=True):
                own, seconds = now.file.result()
            own["peak_memory_bytes"] = own_peak_memory_bytes()
            files, written_s = zip(*comm.gather_objects((own, seconds)), strict=True)
            with fail_together(f"publishing {now.final}", may_pass=True):
                if comm.rank() == 0:
                    manifest = {**now.manifest, "files": files, "time": time.time()}
                    _publish(now.temporary, now.final, manifest)
        except UserError:  # most often a full disk: remove the unfinished files
            if run_lock.is_ours():  # on rank 0; another job may have taken the folder over
                remove_own(now.temporary, may_be_own)
            raise
        # Not the time since ``begin``: steps may lie between, which are no part of saving.
        self.took_s = now.copied_s + max(written_s) + time.perf_counter() - began
        return now.final


def _copied_to_host(shards: Shards) -> tuple[dict[str, Tensor], dict[str, list[int]]]:
    """Copy this rank's training state to host memory, where training does not change it.

    Args:
        shards: this rank's shards of the trained tensors.

    Returns:
        A tuple of two: key in the rank's file, such as "master/NAME" -> tensor to save, on the CPU;
        tensor name -> [first entry, number of entries] of this rank's slice.
    """
    tensors: dict[str, Tensor] = {"rng/cpu": torch.get_rng_state()}
    if comm.on_gpu():
        tensors["rng/cuda"] = torch.cuda.get_rng_state()
    live = on_host(shards.live())
    offsets = {p.name: [p.start, p.length] for p in shards.engine.slices}
    for tensor_slice in shards.engine.slices:
        tensors[f"master/{tensor_slice.name}"] = shards.engine.master(tensor_slice)
        tensors[f"live/{tensor_slice.name}"] = pack_bits(live[tensor_slice.name])
        # For all entries: a dead one may come to life again, and its statistics go on meanwhile.
        stats = shards.stats.get(tensor_slice.name, ())
        tensors |= {f"stat{i}/{tensor_slice.name}": stat for i, stat in enumerate(stats)}
    tensors |= _own_parts_of_sites(shards, offsets)
    # Copy each: safetensors refuses views that share storage.
    own = on_host(tensors)
    # One key at a time: unpacked to all entries, each is as large as the masters.
    for key in PACKED:
        spread = on_host(shards.born() if key == "born" else shards.moments(key))
        packed = {f"{key}/{name}": _packed(t, live[name]) for name, t in spread.items()}
        own |= {k: _one_if_all_equal(t) for k, t in packed.items()} if key == "born" else packed
    return own, offsets


def _own_parts_of_sites(shards: Shards, offsets: dict[str, list[int]]) -> dict[str, Tensor]:
    """Return this rank's slices of kept tensors and of the adapters' means of squared inputs.

    A kept tensor is one that the method writes and no gradient trains, such as a mask. A site is a
    linear that has an adapter.

    Args:
        shards: this rank's shards of the trained tensors.
        offsets: tensor name -> [first entry, number of entries] of this rank's slice. An item is
            added for each kept tensor (its entries are bytes) and for each site's means.

    Returns:
        Key in the rank's file -> slice: "kept/NAME" -> uint8, 1-D; "squares/SITE" -> float64, 1-D.
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
    """Return the values of a slice's live entries.

    Args:
        spread_N: values of all entries of the slice, live and dead, 1-D, on the CPU.
        live_N: mask of the live entries, bool, 1-D.

    Returns:
        One value for each live entry, 1-D, in the order of the slice.
    """
    # Picking all entries by a mask takes five times as long as copying them.
    return spread_N if live_N.all() else spread_N[live_N]


def _one_if_all_equal(births_L: Tensor) -> Tensor:
    """Return a single birth step, shape [1], if all are equal (the usual case), else all of them.

    Args:
        births_L: birth step of each live entry of a slice.
    """
    return births_L[:1].clone() if (births_L == births_L[:1]).all() else births_L


def _write(
    path: Path, own: dict[str, Tensor], offsets: Mapping[str, list[int]]
) -> tuple[dict[str, Any], float]:
    """Write a rank's file and wait until it is on disk. Runs in the ``Saver``'s thread.

    Args:
        path: the file to write.
        own: key in the file -> tensor to save, on the CPU.
        offsets: tensor name -> [first entry, number of entries] of this rank's slice. It is stored
            in the file's metadata.

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
    own = _make_room(temporary, final)
    # It replaces this step if an earlier attempt saved it.
    for left in put_in_place(temporary, final, own.__contains__):
        print_line("warning", left)
    with suppress(OSError):  # for people and scripts; a resume looks at the folders
        write_whole(final.parent / LATEST, f"{final.name}\n")


def _make_room(temporary: Path, final: Path) -> frozenset[str]:
    """Move aside what is at the path of a new checkpoint, unless the new one can replace it: a
    damaged or renamed checkpoint, or somebody else's file.

    Returns:
        The names of the files at ``final`` that the new checkpoint replaces.
    """
    if final.is_symlink() or not final.exists():
        return frozenset()
    own = own_files(final)
    new = {path.name for path in temporary.iterdir()}
    if final.is_dir() and not new & {path.name for path in final.iterdir()} - own:
        return own
    kept = set_aside([final], ())
    print_line("kept", f"{final}, which is no intact checkpoint of this step, in {kept}")
    return frozenset()
