"""The folder that a base cache is written to: which rank writes, and when it is published.

DIR/.writing-HOST-PID-TOKEN/    being written, never read; left behind only by a killed job
DIR/MODEL-KEY/                  the same folder, renamed once all of it is synced to disk
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
"""Age after which a temporary folder of another host counts as left over."""


def new_token() -> str:
    """Return a name for the temporary folder of this job, the same on all ranks. Collective."""
    own = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    return str(comm.broadcast_object(own))


@dataclass
class CacheFolder:
    """This rank's part in writing a cache. Of the ranks that share a disk only one writes."""

    final: Path
    """Path under which the cache is published."""
    out: SafetensorsWriter | None = None
    """The writer; None on a rank that does not write, or whose writing has failed."""
    problem: str | None = None
    """Why writing failed; None if it did not."""

    def begin(self, token: str, *, needed: int, header_bytes: int) -> None:
        """Create the temporary folder, unless a node that shares the disk was first.

        Args:
            token: from ``new_token``.
            needed: free bytes needed on the disk.
            header_bytes: upper bound of the bytes of all safetensors headers.
        """
        directory = self.final.parent
        temporary = directory / f"{PREFIX}{token}"
        try:
            remove_left_overs(directory, but=temporary)
            free = shutil.disk_usage(directory).free
            if free < needed:
                self.problem = (
                    f"{directory} has {megabytes(free)} free, but {megabytes(needed)} are needed"
                )
                return
            temporary.mkdir()
        except FileExistsError:  # another node that shares this disk was first
            return
        except OSError as error:
            self.problem = str(error)
            return
        self.out = SafetensorsWriter(temporary, header_bytes)

    def do(self, work: Callable[[SafetensorsWriter], None]) -> None:
        """Call ``work`` on a rank that writes, and do nothing on the others.

        A failure is stored in ``problem`` and not raised, since the other ranks wait for this one
        in the next collective. The temporary folder is removed.
        """
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
        """Rename the temporary folder to its final name, unless another job was first.

        Args:
            can_stay: returns True if an existing folder is a complete cache. A damaged one is
                replaced.
        """

        def rename(out: SafetensorsWriter) -> None:
            sync(out.folder)
            if self.final.exists() and not can_stay(self.final):
                # Renamed before it is removed, so that no job opens a half removed cache.
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
    """Remove temporary folders of ended jobs: a day old, or of a dead process on this host.

    Args:
        directory: value of --base_cache.
        but: temporary folder of this job, which stays: its rank 0 may run on another host of the
            same name.
    """
    for folder in set(directory.glob(f"{PREFIX}*")) - {but}:
        # ValueError: another kind of name. FileNotFoundError: another rank removed it meanwhile.
        with suppress(ValueError, FileNotFoundError):
            host, pid, _ = folder.name.removeprefix(PREFIX).rsplit("-", 2)
            old = time.time() - folder.stat().st_mtime > LEFT_OVER_SECONDS
            if old or (host == socket.gethostname() and not exists(int(pid))):
                shutil.rmtree(folder, ignore_errors=True)
