"""Find the ranks that keep the others waiting, by two readings of all heartbeats."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

from sparse_lora_dist.distributed import comm
from sparse_lora_dist.runtime.heartbeats import Heartbeat, Heartbeats
from sparse_lora_dist.system.processes import is_gone


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """Which ranks are stuck: the text that the other ranks print, and the ranks that they end."""

    text: str
    lost: Sequence[Heartbeat] = ()
    """Ranks that send no heartbeats any more: stopped, or gone."""
    behind: Sequence[Heartbeat] = ()
    """Ranks that send heartbeats, but have not reached the place where the others wait."""


def find_lost(before: Heartbeats, now: Heartbeats) -> Verdict | None:
    """Find the ranks that sent no heartbeat between two readings, or whose process is gone.

    This rank and ranks that ended with a message of their own do not count.

    Returns:
        The verdict, or None if there are none.
    """
    others = [beat for beat in now.values() if not beat.ended and beat.rank != comm.rank()]
    silent = {rank for rank, beat in before.items() if now.get(rank) == beat}
    lost = [beat for beat in others if beat.rank in silent or is_gone(beat.process)]
    if lost:
        return Verdict(text="; ".join(map(_in_words, lost)), lost=lost)
    return None


def find_store_lost(before: Heartbeats, now: Heartbeats) -> Verdict | None:
    """Verdict that rank 0 is lost, if it holds the store and two readings found no heartbeat of it
    in either place; else None."""
    if 0 in before or 0 in now or comm.rank() == 0 or not comm.store_is_in_rank_0():
        return None
    return Verdict(text="rank 0, which holds the rendezvous store, does not answer any more")


def find_behind(now: Heartbeats) -> Verdict:
    """Find the ranks that are behind, where all send heartbeats."""
    if not now:
        return Verdict(text="No rank answers: suspect the network, or the disk of the run folder")
    least = min(beat.progress for beat in now.values())
    behind = [beat for beat in now.values() if beat.progress == least]
    if len(behind) == len(now):
        return Verdict(text="All ranks answer and are at the same place: suspect the network")
    names = "; ".join(f"{beat.who} at {beat.where}" for beat in behind)
    first = max(now.values(), key=lambda beat: beat.progress)
    return Verdict(
        text=f"Not as far as the others: {names}. Furthest: {first.who} at {first.where}",
        behind=behind,
    )


def _in_words(beat: Heartbeat) -> str:
    if is_gone(beat.process):
        return (
            f"{beat.who} is gone, last seen at {beat.where}. If it printed no message it was "
            "killed, perhaps because memory ran out"
        )
    age = max(0.0, time.time() - beat.time)
    return (
        f"{beat.who} has not answered for {age:.0f} s: it is stopped or gone, or its disk hangs; "
        f"last seen at {beat.where}"
    )
