"""STOP: a signal or the clock ends a run early, at a boundary that all ranks agree on.

A signal sets a flag and nothing else. ``check`` stands at every boundary: before a micro-batch,
between batches of an evaluation, after a step; there the ranks compare, and leave together.
"""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import psutil

from sparse_lora_dist.config.checks import seconds_in
from sparse_lora_dist.distributed import comm
from sparse_lora_dist.distributed.console import print_line
from sparse_lora_dist.errors import Stopped

SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)
ONE_WISH_S = 2.0
"""Signals closer together are one wish: after Ctrl-C, a launcher that got it too sends SIGTERM."""
UNMEASURED = 0.05
"""Part of the time limit that a save is taken to need before one was measured."""
CLOCK = 1
"""What ranks tell each other for the time limit; for a signal, its number, all of which are
larger."""


class _StopRequest:
    """What this rank was told so far."""

    def __init__(self, time_limit_s: float | None) -> None:
        self.code = 0
        self._told_at: float | None = None
        self._limit_s = time_limit_s
        self.slowest_s = 0.0  # between two boundaries
        self.last = time.monotonic()
        self.save_s = UNMEASURED * (time_limit_s or 0.0)

    def take(self, number: int) -> None:
        """A signal has come. Another Ctrl-C, or one after it, ends the process; a scheduler repeats
        itself, with SIGTERM when the time is over that it announced, and then kills."""
        now = time.monotonic()
        if self._told_at is None:
            self._told_at, self.code = now, number
            name = signal.Signals(number).name
            print_line("stops", f"{name}: saves at the next boundary; Ctrl-C then ends at once")
        elif signal.SIGINT in (self.code, number) and now - self._told_at > ONE_WISH_S:
            os._exit(128 + number)

    def look_at_the_clock(self) -> None:
        """Is there no room for another stretch to the next boundary, and to save after it?"""
        now = time.monotonic()
        self.slowest_s, self.last = max(self.slowest_s, now - self.last), now
        if self._limit_s is not None and self.code == 0:
            age_s = time.time() - psutil.Process().create_time()
            if age_s + self.slowest_s + 2 * self.save_s > self._limit_s:
                self.code = CLOCK


_wish: _StopRequest | None = None


@contextmanager
def listening(time_limit: str | None) -> Iterator[None]:
    """Inside, SIGUSR1, SIGTERM and SIGINT are wishes. For the main thread."""
    global _wish
    _wish = wish = _StopRequest(None if time_limit is None else seconds_in(time_limit))
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    # Python's own handlers would wait for the main thread, which may sit in a collective for long.
    earlier_fd = signal.set_wakeup_fd(writing)
    earlier = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}
    listener = threading.Thread(target=_listen, args=(reading, wish), daemon=True)
    listener.start()
    try:
        yield
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(earlier_fd)
        os.close(writing)
        listener.join()
        os.close(reading)
        _wish = None


def _listen(reading: int, wish: _StopRequest) -> None:
    while number := os.read(reading, 1):
        if number[0] in SIGNALS:
            wish.take(number[0])


def begin() -> None:
    """Loading is over: what lies between two boundaries from now on is training."""
    if _wish is not None:
        _wish.slowest_s, _wish.last = 0.0, time.monotonic()


def save_took(seconds: float) -> None:
    """Had one waited for it until it was published: what the clock must leave room for."""
    if _wish is not None:
        _wish.save_s = max(_wish.save_s, seconds)


def check() -> None:
    """Nothing, or Stopped on all ranks, where one of them was told to stop. Collective."""
    if _wish is None:
        return
    _wish.look_at_the_clock()
    if code := comm.largest(_wish.code):
        raise Stopped("--time_limit" if code == CLOCK else signal.Signals(code).name)
