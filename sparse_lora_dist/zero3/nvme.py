"""What shares on a local disk need before anything is loaded: DeepSpeed's async_io built, a folder
with room, and no other job in it."""

import fcntl
import shutil
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from subprocess import CalledProcessError
from typing import IO, Any

from deepspeed.git_version_info import installed_ops
from deepspeed.ops.op_builder import AsyncIOBuilder
from deepspeed.ops.op_builder.pin_memory import PinMemoryBuilder
from torch import nn
from torch.utils.cpp_extension import _get_build_directory

from sparse_lora_dist.distributed import comm
from sparse_lora_dist.distributed.console import megabytes, print_line
from sparse_lora_dist.distributed.phases import fail_together, first_on_its_node
from sparse_lora_dist.errors import UserError

QUIET_S = 1800.0
"""A build in which nothing changes for so long is one that was killed."""

_claims: dict[Path, IO[str]] = {}
"""Lock files of this process, open, and so locked, until it ends."""


def prepare(engine_config: Mapping[str, Any]) -> None:
    """Claim nvme_path and build async_io, where parameters go to NVMe at all. Collective.

    Raises:
        UserError: when another job is in the folder, or the op cannot be built here.
    """
    folder = folder_of(engine_config)
    if folder is not None:
        with fail_together("claiming nvme_path"):
            claim(folder)
        with fail_together("loading async_io"), first_on_its_node():
            load_async_io()


def folder_of(engine_config: Mapping[str, Any]) -> Path | None:
    """offload_param.nvme_path; None where parameters stay in memory."""
    offload = engine_config["zero_optimization"].get("offload_param", {})
    return Path(offload["nvme_path"]) if offload.get("device") == "nvme" else None


def claim(folder: Path) -> None:
    """This rank's files there are this job's from now on; what an earlier job left is removed.

    DeepSpeed names files by rank only, and begins by removing what it finds: a second job in the
    folder would take the shares of the first from under it.
    """
    path = folder / f"rank{comm.rank()}.lock"
    if path not in _claims:
        file = path.open("w")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"zero_optimization.offload_param.nvme_path {folder} is in use by another job; "
                "give each job a folder of its own."
            ) from error
        _claims[path] = file
    for left in folder.glob(f"zero_stage_3/*/rank{comm.rank()}"):
        shutil.rmtree(left)


def why_not() -> str | None:
    """Why async_io can be neither loaded nor built here; None where it can. Takes a second."""
    if installed_ops.get("async_io") or AsyncIOBuilder().is_compatible():
        return None
    return (
        "DeepSpeed's async_io needs libaio's headers and a C++ compiler, "
        "and cannot compile against libaio here; on Debian and Ubuntu: apt install libaio-dev g++"
    )


def load_async_io() -> None:
    """Build async_io, unless that was done before: minutes, once a machine.

    Raises:
        UserError: for what is missing, and a build that fails.
    """
    if (reason := why_not()) is not None:
        raise UserError(f"parameters cannot go to NVMe: {reason}.")
    for op in ("pin_memory", "async_io"):
        wait_for_another_build(Path(_get_build_directory(op, verbose=False)))
    try:
        # The first is loaded by the second, and DeepSpeed finds what is loaded by its name.
        for builder in (PinMemoryBuilder(), AsyncIOBuilder()):
            _without_symbols(builder).load(verbose=False)
    except (RuntimeError, ImportError, CalledProcessError) as error:
        last = "\n".join(str(error).splitlines()[-20:])
        raise UserError(f"DeepSpeed's async_io does not build or load here:\n{last}") from error


def _without_symbols(builder: Any) -> Any:
    """A build without those that a debugger reads: they are a third of its minutes."""
    flags = [*builder.cxx_args(), "-g0"]  # the last -g holds
    builder.cxx_args = lambda: flags  # no subclass: pin_memory's would load itself for ever
    return builder


def wait_for_another_build(folder: Path) -> None:
    """torch would wait for ever on the lock of a process that was killed while it built."""
    lock = folder / "lock"
    if lock.exists():
        print_line(
            "note", f"waiting for another job's build, {lock}; if there is none, delete that file"
        )
    elif not list(folder.glob("*.so")):
        print_line("note", f"compiling DeepSpeed's {folder.name}: minutes, once on this machine")
    while lock.exists():
        with suppress(FileNotFoundError):  # files of a build that goes on come and go
            quiet_s = time.time() - max(f.stat().st_mtime for f in folder.iterdir())
            if quiet_s > QUIET_S:
                lock.unlink()
                print_line(
                    "note", f"{lock} was left by a build that was killed: deleted, building anew"
                )
        time.sleep(0.1)


def check_space(engine_config: Mapping[str, Any], model: nn.Module, *, quantized: bool) -> None:
    """The disk takes at least what this machine's ranks will write. Collective.

    A lower bound: 4 bits a weight that may be quantised, without its scales.
    """
    folder = folder_of(engine_config)
    if folder is None:
        return
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    whole = sum(
        p.numel() // 2 if quantized and id(p) not in embeddings else p.nbytes
        for p in model.parameters()
        if p.dim() > 1
    )
    wanted = whole * comm.ranks_on_this_machine() // comm.world_size()
    with fail_together("checking nvme_path"):
        if (free := shutil.disk_usage(folder).free) < wanted:
            raise UserError(
                f"zero_optimization.offload_param.nvme_path {folder} has {megabytes(free)} free; "
                f"the base's shares on this machine take at least {megabytes(wanted)}."
            )
