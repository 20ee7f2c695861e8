"""Post and read heartbeats: messages with which each rank tells the others that it is alive, and
how far it is in its work.

Each heartbeat is written twice, as JSON: to torch's rendezvous store, and to a file in the folder
``ranks`` of the run folder. The store is gone when the process of rank 0 is; the files can still be
read then.
"""

import json
import re
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from sparse_lora_dist.distributed import comm
from sparse_lora_dist.system.atomic_files import write_whole
from sparse_lora_dist.system.own_files import remove_own
from sparse_lora_dist.system.processes import Process

FOLDER = "ranks"
FILE = re.compile(r"rank_\d{5,}\.json")
"""Name of a heartbeat's file."""
LEFT = re.compile(r"\.tmp_rank_\d{5,}\.json\.[0-9a-f]{16}|\.rank_\d{5,}\.json\.\d+")
"""Name of a file that a killed rank was writing, in this version and before."""
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class Heartbeat:
    """One heartbeat of a rank: its process, and how far it is in the run."""

    rank: int
    process: Process
    """Host and PID of the rank's process."""
    number: int
    """Number of heartbeats that the rank has sent, this one included. It stays the same when the
    process is stopped or gone."""
    time: float
    """Seconds since 1970, by the clock of the rank's host."""
    step: int
    """Number of the optimizer step that the rank is in."""
    phase: str
    """What the rank does, as set by ``watchdog.set_phase``, e.g. "forward"."""
    marks: int
    """Number of calls of ``watchdog.set_phase`` so far. A rank with fewer than the others is
    behind."""
    collectives: int
    """Number of collectives that the rank has entered, those of DeepSpeed included."""
    last_collective: str
    """Name of the last collective that this package called; those of DeepSpeed are not named."""
    ended: bool = False
    """True if the rank is about to end, with an error message of its own."""

    @property
    def progress(self) -> tuple[int, int]:
        """(phases begun, collectives entered): the larger pair is further in the run."""
        return self.marks, self.collectives

    @property
    def who(self) -> str:
        """Rank, host and PID, as text for messages."""
        return f"rank {self.rank} ({self.process})"

    @property
    def where(self) -> str:
        """Step, phase and collectives that the rank had reached, as text for messages."""
        return (
            f"step {self.step}, {self.phase}, collective {self.collectives:,} (the last one that "
            f"is not DeepSpeed's: {self.last_collective})"
        )


Heartbeats = dict[int, Heartbeat]
"""Dict from a rank to its newest heartbeat. Ranks of which none could be read are missing."""


class Board:
    """Posts and reads heartbeats, in torch's rendezvous store and in the folder ``ranks`` of the
    run folder.

    Args:
        run: the run folder.
        patience_s: most seconds that one read waits for the store, and again for the disk.
    """

    def __init__(self, run: Path, *, patience_s: float) -> None:
        self.folder, self.patience_s = run / FOLDER, patience_s
        self._store = comm.Store(patience_s)

    def post(self, heartbeat: Heartbeat) -> None:
        """Write a heartbeat of this rank to the store and to the folder. If one of them cannot be
        written to, it is skipped without an error."""
        with suppress(Exception):  # before the file: a disk may hang, the store does not
            self._store.set(_key(heartbeat.rank), _written(heartbeat))
        self.post_file(heartbeat)

    def post_file(self, heartbeat: Heartbeat) -> None:
        """Write a heartbeat of this rank to the folder only. Used when the rank ends: the store may
        be gone, and torch would print long messages."""
        with suppress(OSError):
            write_whole(self._file(heartbeat.rank), _written(heartbeat) + "\n")

    def read(self) -> Heartbeats:
        """Read the store and the folder, each for at most ``patience_s`` seconds.

        Returns:
            Dict from a rank to the newer of its two heartbeats.
        """
        from_store = in_time(self._of_store, self.patience_s) or []
        found = [*from_store, *self.read_files().values()]
        return {beat.rank: beat for beat in sorted(found, key=lambda beat: beat.number)}

    def read_files(self) -> Heartbeats:
        """Read the folder only, for at most ``patience_s`` seconds.

        Returns:
            Dict from a rank to its heartbeat; {} if the disk does not answer in time.
        """
        return {beat.rank: beat for beat in in_time(self._of_files, self.patience_s) or []}

    def _of_store(self) -> list[Heartbeat]:
        return [_read(text) for text in self._store.get([_key(r) for r in _all_ranks()])]

    def _of_files(self) -> list[Heartbeat]:
        return [_read(self._file(r).read_text()) for r in _all_ranks() if self._file(r).exists()]

    def _file(self, rank: int) -> Path:
        return self.folder / f"rank_{rank:05d}.json"


def is_own(path: Path) -> bool:
    """Return True if a file of the folder ``ranks`` is a heartbeat, or was to become one."""
    if LEFT.fullmatch(path.name):
        return True
    if FILE.fullmatch(path.name) is None or path.is_symlink():
        return False
    try:
        _read(path.read_text())
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False
    return True


def remove_files(folder: Path) -> None:
    """Remove the heartbeats of a job from the folder ``ranks``, and the folder if it is then empty.
    Other files stay, and no error is raised."""
    remove_own(folder, lambda name: is_own(folder / name))


def in_time(work: Callable[[], T], seconds: float) -> T | None:
    """Call ``work`` in a thread, and wait for its result for a limited time.

    If ``work`` hangs, e.g. in reading a disk, its thread goes on waiting after this function has
    returned.

    Args:
        work: function to call.
        seconds: most seconds to wait.

    Returns:
        The result of ``work``; None if it raises an exception or takes longer.
    """
    done: list[T] = []

    def try_it() -> None:
        with suppress(Exception):
            done.append(work())

    thread = threading.Thread(target=try_it, daemon=True)
    thread.start()
    thread.join(seconds)
    return done[0] if done else None


def _all_ranks() -> range:
    return range(comm.world_size())


def _key(rank: int) -> str:
    return f"heartbeat/{rank}"


def _written(heartbeat: Heartbeat) -> str:
    return json.dumps(asdict(heartbeat))


def _read(text: str) -> Heartbeat:
    fields: dict[str, Any] = json.loads(text)
    return Heartbeat(**{**fields, "process": Process(**fields["process"])})
