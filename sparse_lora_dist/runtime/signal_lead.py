"""Warn if the time between a scheduler's signal and its kill is too short to save a checkpoint."""

from math import ceil

from sparse_lora_dist.config.checks import seconds_in
from sparse_lora_dist.distributed.console import print_line


class SignalLead:
    """Compares ``--signal_lead`` with the measured times of steps and saves.

    Call its methods on every rank; rank 0 prints. Not a collective.

    Args:
        lead: value of ``--signal_lead``, the duration between signal and kill, e.g. "90s"; None
            warns of nothing.
    """

    def __init__(self, lead: str | None) -> None:
        self._lead_s = None if lead is None else seconds_in(lead)
        self._slowest_s = 0.0

    def step_took(self, seconds: float) -> None:
        """Record the duration of an optimizer step, in seconds."""
        self._slowest_s = max(self._slowest_s, seconds)

    def save_took(self, seconds: float) -> None:
        """Record the seconds from the begin of a checkpoint to its publishing. Print a warning if
        ``--signal_lead`` is too short, at most once."""
        needed_s = lead_needed_s(self._slowest_s, seconds)
        if self._lead_s is None or self._lead_s >= needed_s:
            return
        print_line(
            "warning",
            f"--signal_lead {self._lead_s:.0f}s is too short: a step takes up to "
            f"{self._slowest_s:.1f} s and a save {seconds:.1f} s, so the signal should come "
            f"{ceil(needed_s)} s before the end. Use #SBATCH --signal=USR1@{ceil(needed_s)}",
        )
        self._lead_s = None


def lead_needed_s(slowest_step_s: float, save_s: float) -> float:
    """Return the seconds needed between the signal and the kill: two steps and two saves.

    Two saves, since one may be under way, and must be finished before the last one begins. Two
    steps, since the signal may come just after a step has begun, and one is a reserve.

    Args:
        slowest_step_s: seconds of the slowest step so far.
        save_s: seconds of the last save.
    """
    return 2 * slowest_step_s + 2 * save_s
