"""Watchdog: end a job in which no rank makes progress, and report which rank is stuck.

A rank makes progress when it enters a collective, or begins a phase: a part of its work with a
name, e.g. "forward" (``set_phase``). The timeout is ``--collective_timeout``.

Each rank has two threads beside the main one. The first posts heartbeats, which tell the other
ranks that this one is alive and what it does, and renews the lock of the run folder. The second
wakes up ``TURNS`` times per timeout, and counts the wake-ups (turns) in a row in which its own rank
has made no progress. When half the timeout is over it reads the heartbeats of all ranks, and after
the whole timeout it reads them again: comparing the two shows which ranks are stuck. It uses
neither the disk nor the rendezvous store while it counts, as these may hang.
"""

import faulthandler
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from uuid import uuid4

from sparse_lora_dist.distributed import comm
from sparse_lora_dist.distributed.phases import fail_together
from sparse_lora_dist.errors import Finished, PeerError, Stopped, UserError
from sparse_lora_dist.run_folder import lock as run_lock
from sparse_lora_dist.runtime.entry_point import FAILURE, HELD, exit_process, write_stderr
from sparse_lora_dist.runtime.heartbeats import (
    Board,
    Heartbeat,
    Heartbeats,
    in_time,
    remove_files,
)
from sparse_lora_dist.runtime.stuck_ranks import (
    Verdict,
    find_behind,
    find_closed,
    find_lost,
    find_store_lost,
)
from sparse_lora_dist.system.cgroups import oom_kills
from sparse_lora_dist.system.processes import kill, mark_this_process, this_process

PEER_LOST = (
    *("closed by peer", "Timed out", "timed out", "reset by peer", "Broken pipe"),
    *("ncclRemoteError", "remote process exited", "closed by remote peer"),
)
"""Texts of gloo and NCCL when another rank is gone or does not come to a collective."""
TURNS = 20
"""Number of times that the counting thread wakes up in one timeout."""
LONGEST_S = 5.0
"""Most seconds between two heartbeats, and most seconds to wait for the store or the disk."""


@dataclass
class _Place:
    """How far this rank is: the arguments of the last ``set_phase``, and how often it was called
    (``marks``)."""

    step: int = 0
    phase: str = "starting"
    marks: int = 0
    may_be_long: bool = True


_place = _Place()


def set_phase(phase: str, *, step: int | None = None, may_be_long: bool = False) -> None:
    """Tell the watchdog what this rank does from here on: its phase. A new phase counts as
    progress, and the message about a stuck rank names its phase.

    Not a collective, but all ranks must set the same phases in the same order.

    Args:
        phase: what the rank does, e.g. "loading the base".
        step: number of the optimizer step from here on; None keeps the current one.
        may_be_long: True if the phase may take longer than the timeout. The job then ends only if a
            rank sends no heartbeats.
    """
    _place.phase, _place.may_be_long = phase, may_be_long
    _place.step = _place.step if step is None else step
    _place.marks += 1


@contextmanager
def watched(run: Path, timeout_s: float) -> Iterator[None]:
    """Context manager: run the watchdog's threads until the context is left. Collective.

    Args:
        run: the run folder.
        timeout_s: seconds after which the job ends if no rank makes progress.

    Raises:
        PeerError: raised instead of the error with which a collective failed on this rank because
            of another rank. The message names the other rank if heartbeats show it.
    """
    set_phase("starting", step=0, may_be_long=True)
    board = Board(run, patience_s=min(LONGEST_S, timeout_s / 4))
    with fail_together(f"opening {board.folder}", may_pass=True):
        if comm.rank() == 0:
            remove_files(board.folder)  # left by an earlier job
            board.folder.mkdir(exist_ok=True)
    token = comm.broadcast_object(uuid4().hex)  # not through the store, which others may read
    mark_this_process(token)
    watch = _Watchdog(board, timeout_s, token)
    crashed = False
    try:
        comm.barrier()  # the store can be read for all ranks only once all have posted
        yield
    except (Finished, Stopped):
        raise
    except UserError as error:
        if not error.shared:
            watch.tell_end()
        raise
    except Exception as error:
        crashed = True
        watch.tell_end()
        if _is_about_a_peer(error):
            raise PeerError(watch.reason(error)) from error
        raise
    finally:
        watch.stop()
        if run_lock.is_ours() and not crashed:  # after a crash its files show where each rank was
            remove_files(board.folder)


class _Watchdog:
    """The two threads of the watchdog on this rank, and the heartbeats of all ranks that they read
    after half the timeout without progress. The threads start when the object is made.

    Args:
        board: object that posts and reads heartbeats.
        timeout_s: seconds after which the job ends if no rank makes progress.
        token: random text that only the ranks of this run know, and mark their processes with.
    """

    def __init__(self, board: Board, timeout_s: float, token: str) -> None:
        self.board, self.timeout_s, self._token = board, timeout_s, token
        self._interval_s = min(LONGEST_S, timeout_s / TURNS)
        self._oom_kills = oom_kills()
        self._numbers, self._ended = count(1), False
        self._at_half: Heartbeats = {}
        self._pid = os.getpid()
        self._stopped = threading.Event()
        board.post(self._heartbeat())
        work = [self._keep_telling] + [self._keep_counting] * (comm.world_size() > 1)
        self._threads = [threading.Thread(target=one, daemon=True) for one in work]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._stopped.set()
        for thread in self._threads:
            thread.join(LONGEST_S)

    def tell_end(self) -> None:
        """Post a last heartbeat, marked as ended, when this rank is about to end with an error
        message of its own. The other ranks then do not report this rank as lost. A process that
        the rank has forked ends without."""
        if os.getpid() != self._pid:
            return
        self._ended = True
        in_time(lambda: self.board.post_file(self._heartbeat()), self.board.patience_s)

    def reason(self, error: Exception) -> str:
        """Return as text why a collective failed on this rank: which other rank is gone or behind.

        Args:
            error: the exception that the collective raised.
        """
        timed_out = "imed out" in str(error)
        verdict = self._find_closed(closed=not timed_out)
        if not verdict.lost and timed_out:
            verdict = find_behind(self.board.read())
        return self._with_memory(verdict.text) or "another rank ended. See its message."

    def _find_closed(self, *, closed: bool) -> Verdict:
        """Wait until it is clear which ranks are gone, and return them. A rank on another host that
        was killed is found by the heartbeats that it does not send."""
        before, began = self.board.read_files(), time.monotonic()
        while True:
            time.sleep(0.1)  # the sockets of a killed process close a moment before it is gone
            is_over = time.monotonic() - began > 2.5 * self._interval_s
            now = self.board.read_files()
            verdict = find_closed(before, now, closed=closed, is_over=is_over)
            if verdict is not None:
                return verdict

    def _with_memory(self, text: str) -> str:
        """Return a text about lost ranks. Add that the kernel has ended processes of this job on
        this machine since the watchdog started, if it has."""
        if not text or oom_kills() <= self._oom_kills:
            return text
        return (
            f"{text} The kernel has ended a process of this job on {this_process().host} because "
            "memory ran out (oom_kill): give the job more memory, or ask launcher/plan.py what "
            "needs less."
        )

    def _keep_telling(self) -> None:
        while not self._stopped.wait(self._interval_s):
            with suppress(Exception):  # no failed heartbeat may end the thread
                self.board.post(self._heartbeat())
            try:
                run_lock.renew()
            except UserError as error:
                self.tell_end()
                write_stderr(f"\nerror: {error}")
                exit_process(HELD)
            except OSError:  # a shared disk may fail for a moment
                continue

    def _heartbeat(self) -> Heartbeat:
        return Heartbeat(
            rank=comm.rank(),
            process=this_process(),
            number=next(self._numbers),
            time=time.time(),
            step=_place.step,
            phase=_place.phase,
            marks=_place.marks,
            collectives=comm.num_collectives(),
            last_collective=comm.last_collective,
            ended=self._ended,
        )

    def _keep_counting(self) -> None:
        # It counts turns, not seconds, so that a job that Slurm suspends and wakes up is not ended.
        # (A suspension longer than the timeout of the process groups ends it: torch uses a clock.)
        still, seen = 0, (0, 0)
        while not self._stopped.wait(self.timeout_s / TURNS):
            now = _place.marks, comm.num_collectives()
            still, seen = (still + 1 if now == seen else 0), now
            if still == TURNS // 2:
                self._at_half = self.board.read()
            if still == TURNS:
                self._judge()
                still = 0

    def _judge(self) -> None:
        """Decide what to do after one timeout without progress on this rank. Runs in the counting
        thread of each rank.

        If a rank sends no heartbeats any more, its process is gone, or the rendezvous store does
        not answer, end this process with a message that names it. If all ranks send heartbeats, end
        this process and name the ranks that are behind, unless the present phase may be long:
        then do nothing.
        """
        now = self.board.read()
        verdict = find_lost(self._at_half, now) or find_store_lost(self._at_half, now)
        if verdict is None and not _place.may_be_long:
            verdict = find_behind(now)
        if verdict is not None:
            self._end(verdict)

    def _end(self, verdict: Verdict) -> None:
        write_stderr(
            f"\nrank {comm.rank()} ends: no rank made progress for {self.timeout_s:g} s "
            f"(--collective_timeout). {self._with_memory(verdict.text)}"
        )
        if any(beat.rank == comm.rank() for beat in verdict.behind):
            faulthandler.dump_traceback()  # shows where this rank is stuck
            # Last, so that the ranks that wait for this one name it too: in a collective with a
            # rank that has ended they would only see a closed connection.
            self._stopped.wait(2 * self.timeout_s / TURNS)
        self.tell_end()
        for beat in verdict.lost:  # with SIGKILL: a stopped process takes no other signal
            with suppress(OSError):
                kill(beat.process, self._token)
        exit_process(FAILURE)


def _is_about_a_peer(error: BaseException) -> bool:
    """Return True if ``error`` is torch's message that another rank is gone or did not join a
    collective in time."""
    return isinstance(error, RuntimeError) and any(text in str(error) for text in PEER_LOST)
