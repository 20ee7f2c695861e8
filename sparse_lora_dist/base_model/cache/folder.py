"""The folder in which a cache is written: who writes, and when it gets its name.

DIR/.writing-HOST-PID-TOKEN/    nobody reads it; left behind only by a job that was killed
DIR/MODEL-KEY/                  the same folder, renamed when everything in it is on disk
"""

import os
import shutil
import socket
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from sparse_lora_dist.base_model.safetensors_writer import SafetensorsWriter
from sparse_lora_dist.distributed import comm
from sparse_lora_dist.distributed.console import megabytes
from sparse_lora_dist.errors import UserError
from sparse_lora_dist.system.atomic_files import sync
from sparse_lora_dist.system.processes import exists

PREFIX = ".writing-"
LEFT_OVER_SECONDS = 24 * 3600.0


def new_token() -> str:
    """Names one attempt of one job; the same on all ranks. Collective."""
    own = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    return str(comm.broadcast_object(own))


@dataclass
class CacheFolder:
    """This rank's part in writing: of the ranks that share a disk one writes, until it fails."""

    final: Path
    out: SafetensorsWriter | None = None
    problem: str | None = None
    """Why nothing was written."""

    def begin(self, token: str, *, needed: int, header_bytes: int) -> None:
        """Make the temporary folder, where ``needed`` bytes fit and no other node made it."""
        directory = self.final.parent
        temporary = directory / f"{PREFIX}{token}"
        try:
            remove_left_overs(directory, but=temporary)
            free = shutil.disk_usage(directory).free
            if free < needed:
                self.problem = f"{directory} has {megabytes(free)} free, {megabytes(needed)} needed"
                return
            temporary.mkdir()
        except FileExistsError:  # a node that shares this disk was first
            return
        except OSError as error:
            self.problem = str(error)
            return
        self.out = SafetensorsWriter(temporary, header_bytes)

    def do(self, work: Callable[[SafetensorsWriter], None]) -> None:
        """``work``, where this rank writes; what keeps it from that is noted, not raised: the
        others wait for this rank in the next gather."""
        if self.out is None:
            return
        try:
            work(self.out)
        except (OSError, UserError) as error:
            self.problem = str(error)
            self.out.close()
            shutil.rmtree(self.out.folder, ignore_errors=True)
            self.out = None

    def publish(self, can_stay: Callable[[Path], bool]) -> None:
        """Give the folder its name, unless another job was first; a damaged one is replaced."""

        def rename(out: SafetensorsWriter) -> None:
            sync(out.folder)
            if self.final.exists() and not can_stay(self.final):
                # Aside first: nobody may open a folder of that name that is half removed.
                aside = out.folder.with_name(f"{out.folder.name}old")
                self.final.rename(aside)
                shutil.rmtree(aside, ignore_errors=True)
            try:
                out.folder.rename(self.final)
            except OSError:
                if not can_stay(self.final):
                    raise
                shutil.rmtree(out.folder)  # another job was first
            sync(self.final.parent)

        self.do(rename)


def remove_left_overs(directory: Path, but: Path) -> None:
    """What jobs that are gone left half written: a day old, or of a dead process on this host.

    ``but``: of this job, whose rank 0 may live on a host of the same name.
    """
    for folder in set(directory.glob(f"{PREFIX}*")) - {but}:
        # Not a name of ours, or another rank removes it at the same time.
        with suppress(ValueError, FileNotFoundError):
            host, pid, _ = folder.name.removeprefix(PREFIX).rsplit("-", 2)
            old = time.time() - folder.stat().st_mtime > LEFT_OVER_SECONDS
            if old or (host == socket.gethostname() and not exists(int(pid))):
                shutil.rmtree(folder, ignore_errors=True)
