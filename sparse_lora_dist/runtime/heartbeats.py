"""What each rank tells the others about itself, in two places: the store that the ranks met at, and
``RUN/ranks/``, which answers also when the store is stopped with rank 0."""

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
    """Where a rank is."""

    rank: int
    process: Process
    number: int
    """How many it has sent: it stays where the process is stopped or gone."""
    time: float
    """Seconds since 1970, by the clock of its host."""
    step: int
    phase: str
    marks: int
    """Phases behind it, and the collectives it has entered: who has fewer lags."""
    collectives: int
    last_collective: str
    ended: bool = False
    """It ends, and its own message says why."""

    @property
    def progress(self) -> tuple[int, int]:
        return self.marks, self.collectives

    @property
    def who(self) -> str:
        return f"rank {self.rank} ({self.process})"

    @property
    def where(self) -> str:
        return (
            f"step {self.step}, {self.phase}, collective {self.collectives:,}, the last of our own "
            f"{self.last_collective}"
        )


Heartbeats = dict[int, Heartbeat]
"""By rank; those that could be read."""


class Board:
    """Where heartbeats are posted and read."""

    def __init__(self, run: Path, *, patience_s: float) -> None:
        self.folder, self.patience_s = run / FOLDER, patience_s
        self._store = comm.Store(patience_s)

    def post(self, heartbeat: Heartbeat) -> None:
        """In both places; one that cannot be written to is left out."""
        with suppress(Exception):  # before the file: a disk may hang, this does not
            self._store.set(_key(heartbeat.rank), _written(heartbeat))
        self.post_file(heartbeat)

    def post_file(self, heartbeat: Heartbeat) -> None:
        """Without the store, which may have gone: torch tells of that with pages of its own."""
        path = self._file(heartbeat.rank)
        temporary = path.with_name(f".{path.name}.{threading.get_ident()}")
        with suppress(OSError):
            temporary.write_text(_written(heartbeat) + "\n")
            temporary.replace(path)

    def read(self) -> Heartbeats:
        """The newest of every rank, from wherever it is found in time."""
        from_store = in_time(self._of_store, self.patience_s) or []
        found = [*from_store, *self.read_files().values()]
        return {beat.rank: beat for beat in sorted(found, key=lambda beat: beat.number)}

    def read_files(self) -> Heartbeats:
        """Those that are found in time."""
        return {beat.rank: beat for beat in in_time(self._of_files, self.patience_s) or []}

    def _of_store(self) -> list[Heartbeat]:
        return [_read(text) for text in self._store.get([_key(r) for r in _all_ranks()])]

    def _of_files(self) -> list[Heartbeat]:
        return [_read(self._file(r).read_text()) for r in _all_ranks() if self._file(r).exists()]

    def _file(self, rank: int) -> Path:
        return self.folder / f"rank_{rank:05d}.json"


def in_time(work: Callable[[], T], seconds: float) -> T | None:
    """What ``work`` returns; None where it fails, or hangs as stores and disks may."""
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
