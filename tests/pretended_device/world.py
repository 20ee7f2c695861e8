"""Where each tensor would lie, which stream has done what, and what the host waited for.

All tensors are really in host memory. A tag on each storage says where it would lie. Work on the
device is numbered by stream, and each stream and the host have a vector clock: which work of each
stream is known to be done before what comes next.
"""

import sys
import threading
import weakref
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

CUDA, HOST = torch.device("cuda", 0), torch.device("cpu")
DEVICE, PAGEABLE, PINNED = "device", "pageable", "pinned"
"""Places of a tensor: the device's memory, and the two kinds of host memory."""
PACKAGES = ("sparse_lora_dist", "deepspeed", "transformers", "bitsandbytes", "tests")
"""Packages whose lines are named as the place of a problem, a wait or a launch."""

local = threading.local()
"""What belongs to one thread: its stream, and where the operation inside it makes tensors."""


class Clock(dict[str, int]):
    """Name of a stream -> number of its work that is known to be done."""

    def merge(self, other: "Clock") -> None:
        """Know what ``other`` knows too."""
        for name, number in other.items():
            self[name] = max(number, self.get(name, 0))


class Stream:
    """A stream of the pretended device, with the interface of ``torch.cuda.Stream``."""

    made = 0
    all: "weakref.WeakSet[Stream]" = weakref.WeakSet()
    cuda_stream = 0

    def __init__(self, name: str | None = None, **_: Any) -> None:
        Stream.made += 1
        self.name = name or f"stream {Stream.made}"
        self.clock = Clock()
        Stream.all.add(self)

    def tick(self) -> int:
        """Begin a piece of work and return its number. It follows all that the host waited for."""
        self.clock.merge(world.host)
        self.clock[self.name] = self.clock.get(self.name, 0) + 1
        return self.clock[self.name]

    def wait_stream(self, other: "Stream") -> None:
        self.clock.merge(world.host)
        self.clock.merge(other.clock)

    def wait_event(self, event: "Event") -> None:
        self.clock.merge(event.clock)

    def record_event(self, event: "Event | None" = None) -> "Event":
        event = event or Event()
        event.record(self)
        return event

    def synchronize(self) -> None:
        world.wait(f"{self.name}.synchronize", self.clock)

    def query(self) -> bool:
        return True


class Event:
    """An event of the pretended device, with the interface of ``torch.cuda.Event``."""

    def __init__(self, **_: Any) -> None:
        self.clock = Clock()

    def record(self, stream: Stream | None = None) -> None:
        self.clock = Clock((stream or current_stream()).clock)

    def wait(self, stream: Stream | None = None) -> None:
        (stream or current_stream()).wait_event(self)

    def query(self) -> bool:
        return False  # the hardest case: the device is always behind the host

    def synchronize(self) -> None:
        world.wait("event.synchronize", self.clock)

    def elapsed_time(self, other: "Event") -> float:
        return 0.0


class World:
    """What is known of the pretended device. Counters are by phase of the watchdog."""

    def __init__(self) -> None:
        self.host = Clock()
        self.clear()
        self._places: dict[int, tuple[StorageWeakRef, str]] = {}
        self._writes: dict[int, tuple[str, int]] = {}
        self._reads: dict[int, dict[str, int]] = defaultdict(dict)
        self._purge_at = 20_000

    def clear(self) -> None:
        """Forget what was counted; a new run begins."""
        self.phase = "starting"
        self.problems: Counter[str] = Counter()
        self.launches: dict[str, Counter[str]] = defaultdict(Counter)
        self.waits: dict[str, Counter[str]] = defaultdict(Counter)

    def put(self, t: Tensor, place: str) -> None:
        """Say that a new tensor lies at ``place``."""
        if (key := _key(t)) is None:
            return
        self._places[key] = StorageWeakRef(t.untyped_storage()), place
        self._forget(key)
        if len(self._places) > self._purge_at:
            places = list(self._places.items())  # backward's thread may add to them meanwhile
            for gone in [k for k, (ref, _) in places if ref.expired()]:
                self._places.pop(gone, None)
                self._forget(gone)
            self._purge_at = max(20_000, 2 * len(self._places))

    def _forget(self, key: int) -> None:
        self._writes.pop(key, None)
        self._reads.pop(key, None)

    def place(self, t: Tensor) -> str | None:
        """Return where a tensor lies; None if it has no memory (on the meta device)."""
        if (key := _key(t)) is None:
            return None
        ref, place = self._places.get(key, (None, PAGEABLE))
        return PAGEABLE if ref is None or ref.expired() else place

    def on_device(self, t: Tensor) -> bool:
        """Return True if the tensor lies in the device's memory."""
        return self.place(t) == DEVICE

    def problem(self, text: str) -> None:
        """Record what a real device would refuse, or do wrong."""
        self.problems[f"{text} at {calling_lines(3)}"] += 1

    def wait(self, what: str, clock: Clock | None = None) -> None:
        """Record that the host waits, by default for all work of the current stream."""
        self.host.merge(current_stream().clock if clock is None else clock)
        self.waits[self.phase][f"{what} at {calling_lines(1)}"] += 1

    def wait_for_everything(self) -> None:
        """The host waits for all streams."""
        for stream in list(Stream.all):
            self.host.merge(stream.clock)
        self.wait("synchronize")

    def work(self, reads: Iterable[Tensor], writes: Sequence[Tensor]) -> None:
        """Let the current stream read and write tensors, and record races with other streams."""
        stream = current_stream()
        number = stream.tick()
        written = {id(t) for t in writes}
        for t in (*reads, *writes):
            key = _key(t)
            if key is None or not self.on_device(t) or t.numel() == 0:
                continue
            what = f"{tuple(t.shape)} {t.dtype}"
            writer, write = self._writes.get(key, ("", 0))
            if stream.clock.get(writer, 0) < write:
                self.problem(f"race: {stream.name} uses what {writer} wrote, unwaited ({what})")
            if id(t) not in written:
                self._reads[key][stream.name] = number
                continue
            for reader, read in self._reads[key].items():
                if stream.clock.get(reader, 0) < read:
                    self.problem(f"race: {stream.name} writes what {reader} reads ({what})")
            self._writes[key], self._reads[key] = (stream.name, number), {}


def _key(t: Tensor) -> int | None:
    try:
        storage = t.untyped_storage()
    except (NotImplementedError, RuntimeError):
        return None
    return int(storage._cdata) if storage.device.type == "cpu" else None


def calling_lines(most: int) -> str:
    """Return file and line of the innermost frames in ``PACKAGES`` outside this folder."""
    frame, lines = sys._getframe(2), list[str]()
    while frame is not None and len(lines) < most:
        name = frame.f_code.co_filename
        for package in PACKAGES:
            if f"/{package}/" in name and "/pretended_device/" not in name:
                lines.append(f"{package}{name.rpartition(f'/{package}')[2]}:{frame.f_lineno}")
                break
        frame = frame.f_back  # type: ignore[assignment]
    return " < ".join(lines) or "torch"


world = World()
DEFAULT, NCCL = Stream("default"), Stream("nccl")


def current_stream(*_: Any) -> Stream:
    """Return the stream on which this thread launches work."""
    return getattr(local, "stream", None) or DEFAULT


@contextmanager
def on_stream(stream: Stream | None) -> Iterator[None]:
    """Context manager: launch work on another stream."""
    with setting("stream", stream):
        yield


@contextmanager
def setting(name: str, value: Any) -> Iterator[None]:
    """Context manager: give an attribute of ``local`` another value."""
    before = getattr(local, name, None)
    setattr(local, name, value)
    try:
        yield
    finally:
        setattr(local, name, before)
