"""Prepare a local disk for offloaded shards: check its space, lock the folder, build async_io.

async_io is the compiled DeepSpeed extension that reads and writes the shards. The folder is the
option zero_optimization.offload_param.nvme_path of the DeepSpeed configuration.
"""

import fcntl
import shutil
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from subprocess import CalledProcessError
from typing import IO, Any

import torch
from deepspeed.git_version_info import installed_ops
from deepspeed.ops.op_builder import AsyncIOBuilder
from deepspeed.ops.op_builder.pin_memory import PinMemoryBuilder
from torch import nn
from torch.utils.cpp_extension import CUDA_HOME, _get_build_directory

from sparse_lora_dist.distributed import comm
from sparse_lora_dist.distributed.console import megabytes, print_line
from sparse_lora_dist.distributed.phases import fail_together, first_on_its_node
from sparse_lora_dist.errors import UserError

QUIET_S = 1800.0
"""Seconds without a change in a build folder after which the build counts as killed."""

_claims: dict[Path, IO[str]] = {}
"""Open lock files by path. A lock is held while its file is open, until this process ends."""


def prepare(engine_config: Mapping[str, Any]) -> None:
    """Lock nvme_path and build async_io if parameters are offloaded to NVMe. Collective.

    Call it before the first sharded parameter is created. It does nothing if parameters stay in
    memory.

    Args:
        engine_config: the DeepSpeed configuration, as a dict of its JSON form.

    Raises:
        UserError: another job uses the folder, or async_io cannot be built here.
    """
    folder = folder_of(engine_config)
    if folder is not None:
        with fail_together("claiming nvme_path"):
            claim(folder)
        with fail_together("loading async_io"), first_on_its_node():
            load_async_io()


def folder_of(engine_config: Mapping[str, Any]) -> Path | None:
    """Return zero_optimization.offload_param.nvme_path, or None if parameters stay in memory.

    Args:
        engine_config: the DeepSpeed configuration, as a dict of its JSON form.
    """
    offload = engine_config["zero_optimization"].get("offload_param", {})
    return Path(offload["nvme_path"]) if offload.get("device") == "nvme" else None


def claim(folder: Path) -> None:
    """Lock this rank's files in ``folder`` for this job, and remove those of an earlier job.

    DeepSpeed names its files by rank only, and first removes the files that it finds. Without a
    lock, a second job in the folder would delete the shards of the first. The lock is held until
    this process ends. Not collective.

    Args:
        folder: value of nvme_path.

    Raises:
        UserError: another job holds the lock.
    """
    path = folder / f"rank{comm.rank()}.lock"
    if path not in _claims:
        file = path.open("w")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"zero_optimization.offload_param.nvme_path {folder} is in use by another job. "
                "Give each job a folder of its own."
            ) from error
        _claims[path] = file
    for left in folder.glob(f"zero_stage_3/*/rank{comm.rank()}"):
        shutil.rmtree(left)


def why_not() -> str | None:
    """Return the reason why async_io can be neither loaded nor built here, or None if it can.

    The reason is one or more sentences without the final full stop, to be used in an error message.
    The check takes a second.
    """
    if installed_ops.get("async_io"):
        return None
    if comm.on_gpu() and torch.version.hip is None and CUDA_HOME is None:
        return (
            "DeepSpeed builds its async_io against a CUDA toolkit, and none is found here. Load "
            "the module of one, or set CUDA_HOME"
        )
    if AsyncIOBuilder().is_compatible():
        return None
    return (
        "DeepSpeed's async_io needs libaio's headers and a C++ compiler, and at least one of them "
        "is missing here. On Debian and Ubuntu: apt install libaio-dev g++"
    )


def load_async_io() -> None:
    """Load async_io; build it first if this machine has no build of it yet. Not collective.

    Building takes minutes. Several ranks may call it at a time: one builds, and the others wait.

    Raises:
        UserError: headers or compiler are missing, or the build fails.
    """
    if (reason := why_not()) is not None:
        raise UserError(f"Parameters cannot be offloaded to NVMe. {reason}.")
    for op in ("pin_memory", "async_io"):
        wait_for_another_build(Path(_get_build_directory(op, verbose=False)))
    try:
        # async_io would load pin_memory itself, with symbols. DeepSpeed reuses the one loaded here.
        for builder in (PinMemoryBuilder(), AsyncIOBuilder()):
            _without_symbols(builder).load(verbose=False)
    except (RuntimeError, ImportError, CalledProcessError) as error:
        last = "\n".join(str(error).splitlines()[-20:])
        raise UserError(
            "DeepSpeed's async_io cannot be built or loaded here. Keep the parameters in memory "
            "(zero_optimization.offload_param.device none or cpu), or fix the problem that the "
            f"build reports:\n{last}"
        ) from error


def _without_symbols(builder: Any) -> Any:
    """Make a builder compile without debug symbols, which saves a third of the time.

    Args:
        builder: DeepSpeed's builder of an extension, which is changed in place.

    Returns:
        The same builder.
    """
    flags = [*builder.cxx_args(), "-g0"]  # the last -g option wins
    builder.cxx_args = lambda: flags  # not a subclass: pin_memory's would load itself for ever
    return builder


def wait_for_another_build(folder: Path) -> None:
    """Wait while another process builds a DeepSpeed extension; delete the lock of a killed build.

    A build counts as killed if nothing in its folder has changed for ``QUIET_S``. torch itself
    would wait for ever for such a lock. Rank 0 prints what it waits for, or that it will compile.

    Args:
        folder: the build folder of the extension.
    """
    lock = folder / "lock"
    if lock.exists():
        print_line(
            "note",
            f"waiting for another job that builds DeepSpeed's {folder.name}. If no other job runs, "
            f"delete {lock}.",
        )
    elif not list(folder.glob("*.so")):
        print_line(
            "note",
            f"compiling DeepSpeed's {folder.name}. This takes minutes, once for each machine.",
        )
    while lock.exists():
        with suppress(FileNotFoundError):  # a running build creates and removes files
            changed_s = [f.stat().st_mtime for f in folder.iterdir()]
            quiet_s = time.time() - max(changed_s, default=time.time())  # the lock may be gone
            if quiet_s > QUIET_S:
                lock.unlink()
                print_line(
                    "note",
                    f"{lock} was left by a build that was killed. It was deleted to build again.",
                )
        time.sleep(0.1)


def check_space(engine_config: Mapping[str, Any], model: nn.Module, *, quantized: bool) -> None:
    """Raise UserError if nvme_path lacks room for the shards of this machine's ranks. Collective.

    Call it before the base model is loaded. The estimated size is a lower bound: half a byte for
    each weight that may be quantised, and no scales.

    Args:
        engine_config: the DeepSpeed configuration. If it does not offload parameters to NVMe,
            nothing is checked.
        model: the model, still on the meta device.
        quantized: True if linear weights will be held in 4 bits.

    Raises:
        UserError: there is too little free space.
    """
    folder = folder_of(engine_config)
    if folder is None:
        return
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    model_bytes = sum(
        p.numel() // 2 if quantized and id(p) not in embeddings else p.nbytes
        for p in model.parameters()
        if p.dim() > 1
    )
    needed = model_bytes * comm.ranks_on_this_machine() // comm.world_size()
    with fail_together("checking nvme_path"):
        if (free := shutil.disk_usage(folder).free) < needed:
            raise UserError(
                f"zero_optimization.offload_param.nvme_path {folder} has {megabytes(free)} free, "
                f"but the base's shards on this machine need at least {megabytes(needed)}. Choose "
                "a disk with more room."
            )
