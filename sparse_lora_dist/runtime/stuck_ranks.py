"""Find the ranks that keep the others waiting, by comparing two readings of all heartbeats."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

from sparse_lora_dist.distributed import comm
from sparse_lora_dist.runtime.heartbeats import Heartbeat, Heartbeats
from sparse_lora_dist.system.processes import is_gone


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """Result of comparing heartbeats: which ranks are stuck, and the text that says so."""

    text: str
    """Sentences that the other ranks print."""
    lost: Sequence[Heartbeat] = ()
    """Last heartbeats of the ranks that send none any more: their processes are stopped or gone.
    The other ranks kill them."""
    behind: Sequence[Heartbeat] = ()
    """Heartbeats of the ranks that are alive, but not at the place where the others wait."""


def find_lost(before: Heartbeats, now: Heartbeats) -> Verdict | None:
    """Find the ranks that sent no heartbeat between two readings, or whose process is gone.

    This rank and ranks that ended with a message of their own do not count.

    Args:
        before: heartbeats of the first reading.
        now: heartbeats of the second reading.

    Returns:
        The verdict; None if there is no such rank.
    """
    others = [beat for beat in now.values() if not beat.ended and beat.rank != comm.rank()]
    silent = {rank for rank, beat in before.items() if now.get(rank) == beat}
    lost = [beat for beat in others if beat.rank in silent or is_gone(beat.process)]
    if lost:
        return Verdict(text=" ".join(map(_in_words, lost)), lost=lost)
    return None


def find_store_lost(before: Heartbeats, now: Heartbeats) -> Verdict | None:
    """Return the verdict that rank 0, which holds the rendezvous store, is lost. Return None if it
    does not hold the store, or if one of the two readings has a heartbeat of it."""
    if 0 in before or 0 in now or comm.rank() == 0 or not comm.store_is_in_rank_0():
        return None
    return Verdict(
        text="rank 0, which holds the rendezvous store, does not answer any more. Check its host."
    )


def find_behind(now: Heartbeats) -> Verdict:
    """Return the verdict on the ranks that are behind, for a job in which all ranks send
    heartbeats."""
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
        return (
            f"{beat.who} is gone, last seen at {beat.where}. If it printed no message, it was "
            "killed, perhaps because memory ran out."
        )
    age = max(0.0, time.time() - beat.time)
    return (
        f"{beat.who} has not answered for {age:.0f} s, last seen at {beat.where}. It is stopped or "
        "gone, or its disk hangs. Check its host."
    )
