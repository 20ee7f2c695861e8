"""Find the ranks that keep the others waiting, from the heartbeats of all ranks.

The watchdog calls these functions when its rank has made no progress for the timeout. It has read
the heartbeats twice by then: after half the timeout, and now.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

from sparse_lora_dist.distributed import comm
from sparse_lora_dist.runtime.heartbeats import Heartbeat, Heartbeats
from sparse_lora_dist.system.processes import is_gone, is_seen_from_here


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """Result of comparing heartbeats: which ranks are stuck, and a text that says so."""

    text: str
    """Sentences to print, for the user."""
    lost: Sequence[Heartbeat] = ()
    """Last heartbeats of the ranks that send none any more, as their processes are stopped or gone.
    The watchdog kills these processes."""
    behind: Sequence[Heartbeat] = ()
    """Heartbeats of the ranks that are alive, but have begun fewer phases or collectives than the
    others, which wait for them."""


def find_lost(before: Heartbeats, now: Heartbeats) -> Verdict | None:
    """Find the ranks that sent no heartbeat between two readings, or whose process is gone.

    This rank is left out, and so are ranks that have ended with an error message of their own.

    Args:
        before: heartbeats of the first reading, by rank.
        now: heartbeats of the second reading, by rank.

    Returns:
        Verdict with these ranks in ``lost``; None if there are none.
    """
    others = [beat for beat in now.values() if not beat.ended and beat.rank != comm.rank()]
    silent = {rank for rank, beat in before.items() if now.get(rank) == beat}
    lost = [beat for beat in others if beat.rank in silent or is_gone(beat.process)]
    if lost:
        return Verdict(text=" ".join(map(_in_words, lost)), lost=lost)
    return None


def find_closed(
    before: Heartbeats, now: Heartbeats, *, closed: bool, is_over: bool
) -> Verdict | None:
    """Find the ranks that are gone or stopped, after a collective has failed because of them.

    Args:
        before: heartbeats that were read when it failed, by rank.
        now: newest heartbeats, by rank.
        closed: True if it failed because a connection was closed, so some rank is gone.
        is_over: True if every rank that is alive has sent a heartbeat between the two readings.

    Returns:
        Verdict with these ranks in ``lost``. It has none if all other ranks have ended with
        messages of their own, or are alive. None if it is not clear yet: a rank on another host,
        whose process cannot be seen from here, may still send a heartbeat.
    """
    others = [beat for beat in now.values() if not beat.ended and beat.rank != comm.rank()]
    lost = [beat for beat in others if is_gone(beat.process)]
    if not lost and is_over:
        lost = [beat for beat in others if before.get(beat.rank) == beat]
    if not (lost or is_over or not others):
        return None
    far = {beat.rank for beat in lost if closed and not is_seen_from_here(beat.process)}
    texts = (_gone(beat) if beat.rank in far else _in_words(beat) for beat in lost)
    return Verdict(text=" ".join(texts), lost=lost)


def find_store_lost(before: Heartbeats, now: Heartbeats) -> Verdict | None:
    """Find out whether rank 0 is lost together with the rendezvous store that its process holds.

    ``find_lost`` does not find rank 0 if neither the store nor the run folder gave a heartbeat of
    it. This function is for that case.

    Args:
        before: heartbeats of the first reading, by rank.
        now: heartbeats of the second reading, by rank.

    Returns:
        Verdict whose text says that rank 0 does not answer. None if a reading has a heartbeat of
        rank 0, if this is rank 0, or if the store is not in rank 0's process.
    """
    if 0 in before or 0 in now or comm.rank() == 0 or not comm.store_is_in_rank_0():
        return None
    return Verdict(
        text="rank 0, which holds the rendezvous store, does not answer any more. Check its host."
    )


def find_behind(now: Heartbeats) -> Verdict:
    """Find the ranks that are furthest behind, in a job in which all ranks send heartbeats.

    Args:
        now: newest heartbeats, by rank.

    Returns:
        Verdict with these ranks in ``behind``. If no rank is behind the others, or ``now`` is
        empty, only its text is set and says what to check.
    """
    if not now:
        return Verdict(text="No rank answers. Check the network and the disk of the run folder.")
    least = min(beat.progress for beat in now.values())
    behind = [beat for beat in now.values() if beat.progress == least]
    if len(behind) == len(now):
        return Verdict(text="All ranks answer and are at the same place. Check the network.")
    names = "; ".join(f"{beat.who} at {beat.where}" for beat in behind)
    first = max(now.values(), key=lambda beat: beat.progress)
    return Verdict(
        text=f"These ranks are not as far as the others: {names}. The furthest is {first.who} at "
        f"{first.where}.",
        behind=behind,
    )


def _in_words(beat: Heartbeat) -> str:
    if is_gone(beat.process):
        return _gone(beat)
    age = max(0.0, time.time() - beat.time)
    return (
        f"{beat.who} has not answered for {age:.0f} s, last seen at {beat.where}. It is stopped or "
        "gone, or its disk hangs. Check its host."
    )


def _gone(beat: Heartbeat) -> str:
    return (
        f"{beat.who} is gone, last seen at {beat.where}. It left no message, so it was killed "
        "(signal 9), by a person or by the kernel when memory ran out, or it crashed."
    )
