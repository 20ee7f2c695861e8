"""Who keeps the others waiting, by two readings of all heartbeats."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

from sparse_lora_dist.distributed import comm
from sparse_lora_dist.runtime.heartbeats import Heartbeat, Heartbeats
from sparse_lora_dist.system.processes import is_gone


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What the survivors say, and whom they end."""

    text: str
    lost: Sequence[Heartbeat] = ()
    """Ranks that answer no more: stopped, or gone."""
    behind: Sequence[Heartbeat] = ()
    """Ranks that answer, but have not come to where the others wait."""


def find_lost(before: Heartbeats, now: Heartbeats) -> Verdict | None:
    """Who answers no more: it sent no heartbeat from one reading to the other, or is seen to be
    gone. Who ended with a message of its own does not count, nor who asks."""
    others = [beat for beat in now.values() if not beat.ended and beat.rank != comm.rank()]
    silent = {rank for rank, beat in before.items() if now.get(rank) == beat}
    lost = [beat for beat in others if beat.rank in silent or is_gone(beat.process)]
    if lost:
        return Verdict(text="; ".join(map(_in_words, lost)), lost=lost)
    return None


def find_store_lost(before: Heartbeats, now: Heartbeats) -> Verdict | None:
    """Rank 0 by what it holds, where its file cannot be read either, twice."""
    if 0 in before or 0 in now or comm.rank() == 0 or not comm.store_is_in_rank_0():
        return None
    return Verdict(text="rank 0, which holds what the ranks met at, answers no more")


def find_behind(now: Heartbeats) -> Verdict:
    """Of ranks that all answer, who has got least far."""
    if not now:
        return Verdict(text="Nothing answers: suspect the network, or the disk of the run folder")
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
            f"{beat.who} is gone, last seen at {beat.where}: where it says nothing itself it was "
            "killed, perhaps for want of memory"
        )
    age = max(0.0, time.time() - beat.time)
    return (
        f"{beat.who} has not answered for {age:.0f} s: stopped, gone, or its disk hangs; "
        f"last seen at {beat.where}"
    )
