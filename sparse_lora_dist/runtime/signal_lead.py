"""Warn if a scheduler's signal comes too late for a save before its kill, by measured times."""

from math import ceil

from sparse_lora_dist.config.checks import seconds_in
from sparse_lora_dist.distributed.console import print_line


class SignalLead:
    """Compares ``--signal_lead`` with the measured times of steps and saves.

    Call its methods on every rank; rank 0 prints. Not a collective.
    """

    def __init__(self, lead: str | None) -> None:
        self._lead_s = None if lead is None else seconds_in(lead)
        self._slowest_s = 0.0

    def step_took(self, seconds: float) -> None:
        """Record the seconds of an optimizer step."""
        self._slowest_s = max(self._slowest_s, seconds)

    def save_took(self, seconds: float) -> None:
        """Record the seconds from the begin of a checkpoint to its publishing. Warns, once, if the
        lead is too short."""
        needed_s = lead_needed_s(self._slowest_s, seconds)
        if self._lead_s is None or self._lead_s >= needed_s:
            return
        print_line(
            "warning",
            f"--signal_lead {self._lead_s:.0f}s is too short: a step takes up to "
            f"{self._slowest_s:.1f} s and a save {seconds:.1f} s, so the signal should come "
            f"{ceil(needed_s)} s before the end (#SBATCH --signal=USR1@{ceil(needed_s)})",
        )
        self._lead_s = None


def lead_needed_s(slowest_step_s: float, save_s: float) -> float:
    """Seconds needed between the signal and the kill.

    Two saves: one may be under way, and is finished before the last one begins. Two steps: one if
    the signal comes just after a boundary, and one to spare.
    """
    return 2 * slowest_step_s + 2 * save_s
