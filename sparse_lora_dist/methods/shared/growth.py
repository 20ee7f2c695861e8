"""Growth of ranks inside a budget, for IncreLoRA: which linears grow, when, and by how much.

Shapes: S sites, the linears that carry an adapter.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

from sparse_lora_dist.methods.protocol.form import Site


@dataclass(frozen=True, kw_only=True, slots=True)
class Growth:
    """Schedule by which sites open rank-1 components, and how many they open.

    A growth *update* is a step at which some sites open components.
    """

    sites: tuple[Site, ...]
    """Linears that may grow, in the model's order."""
    start: int
    """Number of components open in each site at the start."""
    budget: int
    """Number of components open in all sites together at the end."""
    modules: int
    """Number of sites that grow per update."""
    components: int
    """Number of components that each growing site opens per update."""
    every: int
    """Steps between two updates."""
    first: int
    """Step of the first update, a multiple of ``every``."""
    overshoots: bool
    """True (preset released): the last update may exceed the budget, and all sites that tie with
    the last chosen one grow."""

    @property
    def needed(self) -> int:
        """Number of components to open during the run, over all sites."""
        return self.budget - self.start * len(self.sites)

    @property
    def last(self) -> int:
        """Step of the update that reaches the budget; 0 if no site grows."""
        rounds = ceil(self.needed / (self.modules * self.components))
        return self.first + (rounds - 1) * self.every if rounds > 0 else 0

    def at(self, step: int) -> bool:
        """Return True if an update happens at ``step``."""
        return self.first <= step <= self.last and step % self.every == 0

    def grown(self, open_S: Sequence[int], score_S: Sequence[float]) -> list[int]:
        """Compute how many components each site has open after one update.

        Sites with the highest score grow first; of equal scores, the lowest index. A site that
        cannot take all of its components leaves the rest to the next one. Example with modules 2,
        components 2, rank 4 and budget 10: open (1, 3, 1, 1) and scores (1, 4, 2, 3) give the order
        1, 3, 2, 0. Of the 4 components to open, site 1 takes 1 (its capacity is 4), site 3 takes 2,
        and site 2 takes the last one. The result is (1, 4, 2, 3).

        Args:
            open_S: Number of open components of each site before the update.
            score_S: Importance of each site.

        Returns:
            Number of open components of each site after the update.
        """
        room_S = [site.rank - n for site, n in zip(self.sites, open_S, strict=True)]
        order = sorted((s for s, room in enumerate(room_S) if room), key=lambda s: -score_S[s])
        left = self.budget - sum(open_S)
        modules, limit = min(self.modules, left), left
        if self.overshoots:
            least = score_S[order[:modules][-1]]
            modules, limit = max(modules, sum(score_S[s] >= least for s in order)), sum(room_S)
        opening, after_S = min(modules * self.components, limit), list(open_S)
        while opening > 0:
            # A second round is needed only if some sites have no room for all of their components.
            for s in order:
                extra = min(self.components, self.sites[s].rank - after_S[s], opening)
                after_S[s] += extra
                opening -= extra
        return after_S

    def notes(self) -> tuple[str, ...]:
        """Return a note to print before training if no linear grows, or if the last update exceeds
        the budget.

        Components that exceed it because of tied scores are not counted: they are not known yet.

        Returns:
            A tuple with the note, or an empty tuple.
        """
        if self.needed == 0:
            return (
                f"no linear grows: all begin with {self.start} components, and end with as many. "
                "Raise --increlora_target_rank, or lower --increlora_start_rank",
            )
        left = self.needed % (self.modules * self.components)
        above = min(self.modules, left) * self.components - left
        if not self.overshoots or above == 0:
            return ()
        total = min(self.budget + above, sum(site.rank for site in self.sites))
        return (
            f"with --increlora_preset released, growth ends at {total} components in all, above "
            f"the budget of {self.budget}. The reserve of each linear, the component that would "
            "open next, is then not set to zero",
        )

    def misfits(self, total_steps: int) -> list[str]:
        """Return the reasons why this growth does not fit the run.

        Args:
            total_steps: Optimizer steps of the run.

        Returns:
            One sentence per reason; an empty list if the growth fits.
        """
        sites, capacity = len(self.sites), sum(site.rank for site in self.sites)
        smallest = min(site.rank for site in self.sites)
        problems = {
            f"--increlora_start_rank {self.start} is above --rank {smallest}. Raise --rank, or "
            "lower --increlora_start_rank": self.start > smallest,
            f"the budget of {self.budget} components is above {capacity}, the sum of the ranks of "
            "all linears. Raise --rank, or lower --increlora_target_rank or "
            "--increlora_budget": self.budget > capacity,
            f"the budget of {self.budget} components is below the start, {sites} linears x "
            f"{self.start}. Raise --increlora_target_rank or --increlora_budget": self.needed < 0,
            f"{self.modules} linears would grow at a time, but there are {sites}. Lower "
            "--increlora_modules, or raise --increlora_pieces": self.modules > sites,
            f"growth would end at step {self.last} of {total_steps}, too late to train what it "
            f"opens. {self._sooner(sites)}, or raise --max_steps": self.last >= total_steps,
        }
        return [problem for problem, is_so in problems.items() if is_so]

    def _sooner(self, sites: int) -> str:
        """Return what makes growth end sooner, without what is at its bound already."""
        if self.every > 1:
            return "Lower --increlora_every"
        if self.modules < sites:
            return "Raise --increlora_modules"
        return "Raise --increlora_pieces, lower --increlora_begin"
