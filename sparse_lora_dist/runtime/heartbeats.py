"""Post and read heartbeats: records with which each rank tells the others that it is alive, and
where it is.

They are posted in two places: torch's rendezvous store, and the folder ``RUN/ranks/``. The store is
gone when rank 0 is; the folder can still be read then.
"""

import json
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from sparse_lora_dist.distributed import comm
from sparse_lora_dist.system.processes import Process

FOLDER = "ranks"
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class Heartbeat:
    """One heartbeat of a rank: its process, and how far it is in the run."""

    rank: int
    process: Process
    number: int
    """Number of heartbeats that the rank has sent. It grows no more when the process is stopped or
    gone."""
    time: float
    """Seconds since 1970, by the clock of the rank's host."""
    step: int
    phase: str
    marks: int
    """Number of phases that the rank has begun. A rank with fewer than the others is behind."""
    collectives: int
    """Number of collectives that the rank has entered."""
    last_collective: str
    """Name of the last collective that this package called; those of DeepSpeed do not count."""
    ended: bool = False
    """True if the rank is ending, with a message of its own."""

    @property
    def progress(self) -> tuple[int, int]:
        return self.marks, self.collectives

    @property
    def who(self) -> str:
        return f"rank {self.rank} ({self.process})"

    @property
    def where(self) -> str:
        return (
            f"step {self.step}, {self.phase}, collective {self.collectives:,} (the last one that "
            f"is not DeepSpeed's: {self.last_collective})"
        )


Heartbeats = dict[int, Heartbeat]
"""Rank -> its newest heartbeat. Ranks of which no heartbeat could be read are missing."""


class Board:
    """Posts and reads heartbeats in both places, the store and the folder ``RUN/ranks/``.

    Args:
        run: the run folder.
        patience_s: most seconds to wait for the store or the disk.
    """

    def __init__(self, run: Path, *, patience_s: float) -> None:
        self.folder, self.patience_s = run / FOLDER, patience_s
        self._store = comm.Store(patience_s)

    def post(self, heartbeat: Heartbeat) -> None:
        """Write a heartbeat to both places; a place that cannot be written to is skipped."""
        with suppress(Exception):  # before the file: a disk may hang, the store does not
            self._store.set(_key(heartbeat.rank), _written(heartbeat))
        self.post_file(heartbeat)

    def post_file(self, heartbeat: Heartbeat) -> None:
        """Write a heartbeat to the folder only, because torch prints long messages if the store is
        gone."""
        path = self._file(heartbeat.rank)
        temporary = path.with_name(f".{path.name}.{threading.get_ident()}")
        with suppress(OSError):
            temporary.write_text(_written(heartbeat) + "\n")
            temporary.replace(path)

    def read(self) -> Heartbeats:
        """Return the newest heartbeat of every rank that either place returns in time."""
        from_store = in_time(self._of_store, self.patience_s) or []
        found = [*from_store, *self.read_files().values()]
        return {beat.rank: beat for beat in sorted(found, key=lambda beat: beat.number)}

    def read_files(self) -> Heartbeats:
        """Return the heartbeats that the folder returns in time."""
        return {beat.rank: beat for beat in in_time(self._of_files, self.patience_s) or []}

    def _of_store(self) -> list[Heartbeat]:
        return [_read(text) for text in self._store.get([_key(r) for r in _all_ranks()])]

    def _of_files(self) -> list[Heartbeat]:
        return [_read(self._file(r).read_text()) for r in _all_ranks() if self._file(r).exists()]

    def _file(self, rank: int) -> Path:
        return self.folder / f"rank_{rank:05d}.json"


def in_time(work: Callable[[], T], seconds: float) -> T | None:
    """Return the result of ``work``; None if it fails or takes more than ``seconds``.

    ``work`` runs in a thread of its own. If the store or the disk hangs, the thread goes on waiting
    after this function has returned.
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
