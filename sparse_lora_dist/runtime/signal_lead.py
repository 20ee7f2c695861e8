"""Is there time to save between a scheduler's signal and its kill? Asked of what was measured."""

from math import ceil

from sparse_lora_dist.config.checks import seconds_in
from sparse_lora_dist.distributed.console import print_line


class SignalLead:
    """Compares the lead with the steps and saves of this run; on every rank, rank 0 speaks."""

    def __init__(self, lead: str | None) -> None:
        self._lead_s = None if lead is None else seconds_in(lead)
        self._slowest_s = 0.0

    def step_took(self, seconds: float) -> None:
        """An optimizer step has been made."""
        self._slowest_s = max(self._slowest_s, seconds)

    def save_took(self, seconds: float) -> None:
        """A checkpoint has been published, so long after it was begun: warns, once, where the lead
        is too short."""
        needed_s = lead_needed_s(self._slowest_s, seconds)
        if self._lead_s is None or self._lead_s >= needed_s:
            return
        print_line(
            "warning",
            f"--signal_lead {self._lead_s:.0f}s is too short: steps take up to "
            f"{self._slowest_s:.1f} s and a save {seconds:.1f} s, so the signal should come "
            f"{ceil(needed_s)} s before the end (#SBATCH --signal=USR1@{ceil(needed_s)})",
        )
        self._lead_s = None


def lead_needed_s(slowest_step_s: float, save_s: float) -> float:
    """A save that is under way is finished before the last one begins; of the steps, one for the
    signal that comes just after a boundary, one to spare."""
    return 2 * slowest_step_s + 2 * save_s
