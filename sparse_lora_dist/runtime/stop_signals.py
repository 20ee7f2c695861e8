"""Stop a run early, by a signal or the time limit, on all ranks at the same point of their work.

A signal only sets a flag on the rank that received it. ``check`` is called at every point where the
run can stop (a boundary): before each micro-batch of a step, before each batch of an evaluation,
and at two points while the run is set up. There the ranks compare their flags and stop together.
"""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import psutil

from sparse_lora_dist.config.checks import seconds_in
from sparse_lora_dist.distributed import comm
from sparse_lora_dist.distributed.console import print_line
from sparse_lora_dist.errors import Stopped, UserError

SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)
SIGNALS_OF_ONE_REQUEST_S = 2.0
"""A signal that comes at most this many seconds after the first belongs to the same request: on
Ctrl-C a launcher sends SIGTERM as well."""
UNMEASURED = 0.05
"""Fraction of the time limit that saving a checkpoint is assumed to take at least. Longer
measured times replace it."""
CLOCK = 1
"""Code that stands for a stop by the time limit. A stop by a signal has the signal's number as its
code, and 0 means no stop. If ranks have different codes, the largest is reported; all numbers of
``SIGNALS`` are larger than 1."""


class _StopRequest:
    """State of this rank: whether it was asked to stop, and the measured times from which
    ``check_time_limit`` computes when to stop.

    Args:
        time_limit_s: most seconds that the process may run, from its start on (``--time_limit``);
            None for no limit.
    """

    def __init__(self, time_limit_s: float | None) -> None:
        self.code = 0
        self.thread = threading.get_ident()
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
                "stops",
                f"on {name}: the run saves a checkpoint and ends. Ctrl-C from now on ends it at "
                "once, without saving.",
            )
        elif (
            signal.SIGINT in (self.code, number)
            and now - self._signalled_at > SIGNALS_OF_ONE_REQUEST_S
        ):
            os._exit(128 + number)

    def check_time_limit(self) -> None:
        """Request a stop if the time left is less than the longest time between two boundaries so
        far, plus twice the time to save a checkpoint. Called at each boundary."""
        now = time.monotonic()
        self.slowest_s, self.last = max(self.slowest_s, now - self.last), now
        if self._limit_s is not None and self.code == 0:
            age_s = time.time() - psutil.Process().create_time()
            if age_s + self.slowest_s + 2 * self.save_s > self._limit_s:
                self.code = CLOCK


_request: _StopRequest | None = None
_open: list[_StopRequest] = []
"""Requests of the runs that are open in this process, in the order in which they began."""


@contextmanager
def listening(time_limit: str | None) -> Iterator[None]:
    """Context manager: inside it SIGUSR1, SIGTERM and SIGINT (Ctrl-C) request a stop instead of
    ending the process. Entered on every rank, in the main thread; not a collective.

    Args:
        time_limit: value of ``--time_limit``, a duration from the start of the process, e.g. "2h";
            None for no limit.
    """
    global _request
    if _request is not None and _request.thread != threading.get_ident():
        raise UserError(
            "Another thread of this process is making a run, and both would share torch's and "
            "DeepSpeed's state. Make the runs one after another, or in processes of their own."
        )
    request = _StopRequest(None if time_limit is None else seconds_in(time_limit))
    _open.append(request)  # the last one is that of a run in whose block this one is made
    _request = request
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    # A thread reads the signals: Python's handlers run in the main thread only, which may wait in a
    # collective for long. A program that trains in another thread gets its signals itself.
    in_main = threading.current_thread() is threading.main_thread()
    earlier_fd = signal.set_wakeup_fd(writing) if in_main else -1
    numbers = SIGNALS if in_main else ()
    earlier = {number: signal.signal(number, lambda *_: None) for number in numbers}
    listener = threading.Thread(target=_listen, args=(reading, request), daemon=True)
    listener.start()
    try:
        yield
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)
        if in_main:
            signal.set_wakeup_fd(earlier_fd)
        os.close(writing)
        listener.join()
        os.close(reading)
        _open.remove(request)
        _request = _open[-1] if _open else None


_blocked: list[set[int | signal.Signals]] = []
"""Signals that were blocked before the fork that is being made."""


def _block() -> None:
    _blocked.append(signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS))


def _unblock() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _blocked.pop())


def _forget_in_child() -> None:
    """In a process that the run has forked, such as a worker of a pool: signals are its own, and
    their numbers must not reach the pipe of the run, also if one comes at once."""
    if _request is not None:
        with suppress(ValueError):  # forked by a thread
            signal.set_wakeup_fd(-1)
            for number in SIGNALS:
                signal.signal(number, signal.SIG_DFL)
    _unblock()


os.register_at_fork(before=_block, after_in_parent=_unblock, after_in_child=_forget_in_child)


def _listen(reading: int, request: _StopRequest) -> None:
    while number := os.read(reading, 1):
        if number[0] in SIGNALS:
            request.take(number[0])


def begin() -> None:
    """Start anew to measure the time between boundaries, at which a run can stop. Called before the
    first step, because loading has few boundaries and would count as a long time between two. Not a
    collective."""
    if _request is not None:
        _request.slowest_s, _request.last = 0.0, time.monotonic()


def save_took(seconds: float) -> None:
    """Record how long a checkpoint took to save. ``--time_limit`` reserves twice the longest of
    these times for the last checkpoint. Not a collective.

    Args:
        seconds: time from the begin of saving until the checkpoint was complete.
    """
    if _request is not None:
        _request.save_s = max(_request.save_s, seconds)


def check() -> None:
    """Raise Stopped on all ranks if one of them was asked to stop. Called wherever the run can
    stop. Collective. Outside ``listening`` it does nothing.

    Raises:
        Stopped: a signal came to one of the ranks, or the time limit is near; on every rank.
    """
    if _request is None:
        return
    _request.check_time_limit()
    if code := comm.largest(_request.code):
        raise Stopped("--time_limit" if code == CLOCK else signal.Signals(code).name)
