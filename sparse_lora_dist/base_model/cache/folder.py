"""Choose the ranks that write a base cache, and publish the cache once it is complete.

A base cache holds the quantised base model on disk. It is written to a temporary folder, which is
renamed ("published") at the end. The folder DIR that is given as ``--base_cache`` contains:

    .writing-HOST-PID-RANDOM/    temporary folder that a job writes to; never read, and left behind
                                 only by a killed job
    MODEL-KEY/                   the published cache: the temporary folder, renamed after all of it
                                 was synced to disk (KEY is explained in ``lookup.py``)
"""

import os
import re
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
from sparse_lora_dist.system.own_files import in_short
from sparse_lora_dist.system.processes import exists

PREFIX = ".writing-"
"""First part of the names of temporary folders."""
OWN = re.compile(r"config\.json|base_cache\.json|.*\.safetensors(?:\.index\.json)?")
"""Names of a cache's files."""
LEFT_OVER_SECONDS = 24 * 3600.0
"""Age in seconds after which a temporary folder is removed, whichever host wrote it."""


def new_token() -> str:
    """Return HOST-PID-RANDOM, the last part of the name of this job's temporary folder. Collective.

    All ranks get the same text. HOST and PID are those of rank 0. RANDOM has 8 hex digits.
    """
    own = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    return str(comm.broadcast_object(own))


@dataclass
class CacheFolder:
    """Writes a base cache on some ranks, and does nothing on the others.

    Every rank creates a ``CacheFolder``. Then one rank of each node calls ``begin``. If several
    nodes share a disk, only the first of their ranks to create the temporary folder becomes a
    writer. Finally every rank calls ``do`` and ``publish``, which do nothing on ranks that are not
    writers. None of these calls is collective.
    """

    final: Path
    """Path of the published cache."""
    out: SafetensorsWriter | None = None
    """Writer of the cache's files; None on a rank that does not write, or after a failure."""
    problem: str | None = None
    """Reason why writing failed on this rank; None if it did not fail."""

    def begin(self, token: str, *, needed: int, header_bytes: int) -> None:
        """Create the temporary folder, unless a node that shares the disk has created it already.

        On success this rank becomes a writer: ``out`` is set. If there is too little space, or if
        an OSError occurs, the reason is stored in ``problem`` and nothing is raised.

        Args:
            token: last part of the folder's name, from ``new_token``.
            needed: number of free bytes that the disk must have.
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
        """Call ``work`` with the writer on a rank that writes, and do nothing on the others.

        If ``work`` raises an OSError or UserError, its text is stored in ``problem``, the temporary
        folder is removed, and this rank is no longer a writer. The error is not passed on, since
        the other ranks wait for this one in the next collective.

        Args:
            work: function that writes files through the ``SafetensorsWriter`` passed to it.
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
        """Rename the temporary folder to ``final``, unless another job has published this cache.

        Args:
            can_stay: function that takes the path of a folder, and returns True if it is a complete
                cache of this base. An existing ``final`` that is not complete is replaced.
        """

        def rename(out: SafetensorsWriter) -> None:
            sync(out.folder)
            if self.final.exists() and not can_stay(self.final):
                _refuse_others_files(self.final)
                if self.final.is_symlink():
                    raise UserError(
                        f"{self.final} is damaged, and not replaced: it is a link. Remove the link"
                    )
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


def _refuse_others_files(folder: Path) -> None:
    """Raise UserError if what lies in the place of a cache has files that no cache has."""
    names = [folder.name] if not folder.is_dir() else os.listdir(folder)
    if others := sorted(name for name in names if OWN.fullmatch(name) is None):
        raise UserError(
            f"{folder} is damaged, and not replaced: {in_short(others)} was not written by this "
            "program. Move it away"
        )


def remove_left_overs(directory: Path, but: Path) -> None:
    """Remove temporary folders that are a day old or belong to an ended process of this host.

    Args:
        directory: value of ``--base_cache``.
        but: temporary folder of this job, which is not removed. Its name has the PID of rank 0. On
            a host that has the same name as rank 0's, this PID might look ended.
    """
    for folder in set(directory.glob(f"{PREFIX}*")) - {but}:
        # ValueError: another kind of name. FileNotFoundError: another rank removed it meanwhile.
        with suppress(ValueError, FileNotFoundError):
            host, pid, _ = folder.name.removeprefix(PREFIX).rsplit("-", 2)
            old = time.time() - folder.stat().st_mtime > LEFT_OVER_SECONDS
            if old or (host == socket.gethostname() and not exists(int(pid))):
                shutil.rmtree(folder, ignore_errors=True)
