"""Which linears grow, when and by how much: the bookkeeping of a rank budget, S sites."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

from sparse_lora_dist.methods.protocol.form import Site


@dataclass(frozen=True, kw_only=True, slots=True)
class Growth:
    """Which linears there are, and when and by how much their ranks grow."""

    sites: tuple[Site, ...]
    start: int
    """Components open in each site at first."""
    budget: int
    modules: int
    components: int
    every: int
    first: int
    overshoots: bool

    @property
    def needed(self) -> int:
        """Components to open in all."""
        return self.budget - self.start * len(self.sites)

    @property
    def last(self) -> int:
        """The step of the growth that reaches the budget; 0 where nothing is to grow."""
        rounds = ceil(self.needed / (self.modules * self.components))
        return self.first + (rounds - 1) * self.every if rounds > 0 else 0

    def at(self, step: int) -> bool:
        """Is it a step of growth?"""
        return self.first <= step <= self.last and step % self.every == 0

    def grown(self, open_S: Sequence[int], score_S: Sequence[float]) -> list[int]:
        """Open components after a growth: those of the highest scores first; ties: the lowest
        index."""
        room_S = [site.rank - n for site, n in zip(self.sites, open_S, strict=True)]
        order = sorted((s for s, room in enumerate(room_S) if room), key=lambda s: -score_S[s])
        left = self.budget - sum(open_S)
        modules, limit = min(self.modules, left), left
        if self.overshoots:
            least = score_S[order[:modules][-1]]
            modules, limit = max(modules, sum(score_S[s] >= least for s in order)), sum(room_S)
        opening, after_S = min(modules * self.components, limit), list(open_S)
        while opening > 0:
            # Once through, unless some had no room for all of theirs.
            for s in order:
                extra = min(self.components, self.sites[s].rank - after_S[s], opening)
                after_S[s] += extra
                opening -= extra
        return after_S

    def notes(self) -> tuple[str, ...]:
        """What the user should know: by how much the last growth overshoots, ties aside."""
        left = self.needed % (self.modules * self.components)
        above = min(self.modules, left) * self.components - left
        if not self.overshoots or above == 0:
            return ()
        total = min(self.budget + above, sum(site.rank for site in self.sites))
        return (
            f"increlora_preset released: growth ends at {total} components in all, above the "
            f"budget of {self.budget}, and the reserve components stay",
        )

    def misfits(self, total_steps: int) -> list[str]:
        """What is wrong with it in a run of so many steps."""
        sites, capacity = len(self.sites), sum(site.rank for site in self.sites)
        smallest = min(site.rank for site in self.sites)
        problems = {
            f"increlora_start_rank {self.start} is above --rank {smallest}: raise rank, or lower "
            "increlora_start_rank": self.start > smallest,
            f"the budget of {self.budget} components is above {capacity}, the sum of the ranks of "
            "all linears: raise rank, or lower the budget": self.budget > capacity,
            f"the budget of {self.budget} components is below the start, {sites} linears x "
            f"{self.start}: raise increlora_target_rank or increlora_budget": self.needed < 0,
            f"{self.modules} linears would grow at a time, but there are {sites}: lower "
            "increlora_modules, or raise increlora_pieces": self.modules > sites,
            f"growth would end at step {self.last} of {total_steps}, "
            f"{self.last + 1 - total_steps} steps too late to train what it opens: lower "
            "increlora_every, or raise increlora_modules": self.last >= total_steps,
        }
        return [problem for problem, is_so in problems.items() if is_so]
