"""Warn if the time between a scheduler's signal and its kill is too short to save a checkpoint."""

from math import ceil

from sparse_lora_dist.config.checks import seconds_in
from sparse_lora_dist.distributed.console import print_line


class SignalLead:
    """Compares ``--signal_lead`` with the measured times of optimizer steps and of checkpoints.

    A scheduler such as Slurm sends a signal some time before it kills a job. ``--signal_lead`` says
    how long before. Call the methods on every rank; rank 0 prints the warning. Not a collective.

    Args:
        lead: value of ``--signal_lead``, e.g. "90s"; None for no such signal, and so no warning.
    """

    def __init__(self, lead: str | None) -> None:
        self._lead_s = None if lead is None else seconds_in(lead)
        self._slowest_s = 0.0

    def step_took(self, seconds: float) -> None:
        """Record the duration of an optimizer step, in seconds."""
        self._slowest_s = max(self._slowest_s, seconds)

    def save_took(self, seconds: float) -> None:
        """Record how long a checkpoint took to save. Print a warning, at most once, if
        ``--signal_lead`` is too short.

        Args:
            seconds: time from the begin of saving until the checkpoint was complete.
        """
        needed_s = lead_needed_s(self._slowest_s, seconds)
        if self._lead_s is None or self._lead_s >= needed_s:
            return
        print_line(
            "warning",
            f"--signal_lead {self._lead_s:.0f}s is too short: a step takes up to "
            f"{self._slowest_s:.1f} s and a save {seconds:.1f} s, so the signal should come "
            f"{ceil(needed_s)} s before the end. Use #SBATCH --signal=USR1@{ceil(needed_s)} and "
            f"--signal_lead {ceil(needed_s)}s.",
        )
        self._lead_s = None


def lead_needed_s(slowest_step_s: float, save_s: float) -> float:
    """Return the seconds that a job needs between the signal and the kill: two steps and two saves.

    Two saves, since a checkpoint may be being written when the signal comes, and must be finished
    before the last one begins. Two steps, since the signal may come just after a step has begun,
    and the second one is a reserve.

    Args:
        slowest_step_s: seconds of the slowest optimizer step so far.
        save_s: seconds that the last checkpoint took to save.
    """
    return 2 * slowest_step_s + 2 * save_s
