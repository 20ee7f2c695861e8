"""Stop a run early, by a signal or the time limit, on all ranks at the same place.

A signal only sets a flag. ``check`` is called at every boundary: before a micro-batch, between
batches of an evaluation, after a step. There the ranks compare their flags and stop together.
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
SIGNALS_OF_ONE_REQUEST_S = 2.0
"""Signals at most this many seconds apart are one request: on Ctrl-C a launcher sends SIGTERM as
well."""
UNMEASURED = 0.05
"""Fraction of the time limit that a save is assumed to take until one has been measured."""
CLOCK = 1
"""Code of a stop by the time limit. The code of a stop by a signal is the signal's number. If ranks
have different codes, the largest is reported; all numbers of ``SIGNALS`` are larger than 1."""


class _StopRequest:
    """State of this rank: whether it was asked to stop, and the measured times that
    ``--time_limit`` needs.

    Args:
        time_limit_s: seconds from the start of the process; None for no limit.
    """

    def __init__(self, time_limit_s: float | None) -> None:
        self.code = 0
        self._signalled_at: float | None = None
        self._limit_s = time_limit_s
        self.slowest_s = 0.0  # between two boundaries
        self.last = time.monotonic()
        self.save_s = UNMEASURED * (time_limit_s or 0.0)

    def take(self, number: int) -> None:
        """Handle a signal. The first one requests a stop.

        A later signal ends the process at once if it or the first one is a Ctrl-C. Other later
        signals are ignored: a scheduler repeats its signal, and sends SIGTERM at the end of the
        lead time.

        Args:
            number: number of the signal.
        """
        now = time.monotonic()
        if self._signalled_at is None:
            self._signalled_at, self.code = now, number
            name = signal.Signals(number).name
            print_line(
                "stops", f"{name}: saves at the next boundary; Ctrl-C after that ends it at once"
            )
        elif (
            signal.SIGINT in (self.code, number)
            and now - self._signalled_at > SIGNALS_OF_ONE_REQUEST_S
        ):
            os._exit(128 + number)

    def check_time_limit(self) -> None:
        """Request a stop if the time left is too short to reach the next boundary and to save a
        checkpoint there."""
        now = time.monotonic()
        self.slowest_s, self.last = max(self.slowest_s, now - self.last), now
        if self._limit_s is not None and self.code == 0:
            age_s = time.time() - psutil.Process().create_time()
            if age_s + self.slowest_s + 2 * self.save_s > self._limit_s:
                self.code = CLOCK


_request: _StopRequest | None = None


@contextmanager
def listening(time_limit: str | None) -> Iterator[None]:
    """Context manager: inside it SIGUSR1, SIGTERM and SIGINT request a stop. For the main thread.

    Args:
        time_limit: value of ``--time_limit``, a duration from the start of the process, e.g. "2h";
            None for no limit.
    """
    global _request
    _request = request = _StopRequest(None if time_limit is None else seconds_in(time_limit))
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    # A thread reads the signals: Python's handlers run in the main thread only, which may wait in a
    # collective for long.
    earlier_fd = signal.set_wakeup_fd(writing)
    earlier = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}
    listener = threading.Thread(target=_listen, args=(reading, request), daemon=True)
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
        _request = None


def _listen(reading: int, request: _StopRequest) -> None:
    while number := os.read(reading, 1):
        if number[0] in SIGNALS:
            request.take(number[0])


def begin() -> None:
    """Start to measure the time between boundaries. Called after loading, which has none. Not a
    collective."""
    if _request is not None:
        _request.slowest_s, _request.last = 0.0, time.monotonic()


def save_took(seconds: float) -> None:
    """Record the seconds from the begin of a save to its publishing. ``--time_limit`` reserves
    twice the longest of them for the last save. Not a collective."""
    if _request is not None:
        _request.save_s = max(_request.save_s, seconds)


def check() -> None:
    """Raise Stopped on all ranks if one of them was asked to stop. Collective.

    Raises:
        Stopped: a signal came to one of the ranks, or the time limit is near; on every rank.
    """
    if _request is None:
        return
    _request.check_time_limit()
    if code := comm.largest(_request.code):
        raise Stopped("--time_limit" if code == CLOCK else signal.Signals(code).name)
