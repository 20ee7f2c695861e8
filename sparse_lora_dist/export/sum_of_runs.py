"""Several adapters over one base, added up: pairs side by side, changes summed.

Shapes: O out_features, I in_features, L live components.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from sparse_lora_dist.errors import UserError
from sparse_lora_dist.export.peft_adapter import Pair
from sparse_lora_dist.export.peft_own_type import OwnType
from sparse_lora_dist.export.trained_run import Trained
from sparse_lora_dist.export.weight_change import Change
from sparse_lora_dist.methods import Method
from sparse_lora_dist.methods.protocol.form import Site


@dataclass(frozen=True, kw_only=True)
class Sum:
    """Of changes of one weight."""

    changes: Sequence[Change]

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I)"""
        return self.changes[0].shape

    def rows(self, start: int, stop: int) -> Tensor:
        """[stop - start, I]"""
        first, *others = (change.rows(start, stop) for change in self.changes)
        return sum(others, start=first)

    @property
    def at_most(self) -> int:
        """Weights that it can change at most."""
        rows, columns = self.shape
        return min(sum(c.at_most for c in self.changes), rows * columns)

    @property
    def norm(self) -> float:
        """Frobenius."""
        return float(self.rows(0, self.shape[0]).double().norm())


@dataclass(frozen=True, kw_only=True)
class Union(Trained):
    """The first run, to which what others add is added. Each keeps its own scale."""

    first: Trained
    others: tuple[Trained, ...]

    @classmethod
    def of(cls, first: Trained, sources: Sequence[str]) -> "Union":
        """With the runs, or checkpoints, in ``sources``.

        Raises:
            UserError: one is missing or damaged, or cannot be added.
        """
        others = tuple(Trained.open(Path(source)) for source in sources)
        for run in (first, *others):
            _check(run, first)
        own = {f.name: getattr(first, f.name) for f in fields(Trained)}
        return cls(**own, first=first, others=others)

    @cached_property
    def sites(self) -> tuple[Site, ...]:
        """Linears that any of them adapts, those of the first one first."""
        found: dict[str, Site] = {}
        for run in (self.first, *self.others):
            found = {site.name: site for site in run.sites} | found
        return tuple(found.values())

    @cached_property
    def method(self) -> Method:
        """The first run's."""
        return self.first.method

    @cached_property
    def full(self) -> tuple[str, ...]:
        """Those of the first run: others have none."""
        return self.first.full

    @property
    def is_lora(self) -> bool:
        """Is what each adds a LoRA everywhere?"""
        return self.first.is_lora and all(run.is_lora for run in self.others)

    @property
    def masks_base(self) -> bool:
        """Such runs are refused."""
        return False

    def own_type(self) -> OwnType | None:
        """PEFT has none of sums."""
        return None

    def pair(self, site: Site, dtype: torch.dtype = torch.float32) -> Pair | None:
        """All pairs side by side as ``dtype`` has them, the scales of the others in their B. In
        fp32: B times a scale would be rounded once more."""
        found = []
        for run, own in self._with(site):
            if pair := run.pair(own, dtype):
                found.append((pair[0].float(), pair[1].float() * (run.scale / self.scale)))
        if not found:
            return None
        return torch.cat([a_LI for a_LI, _ in found]), torch.cat([b_OL for _, b_OL in found], dim=1)

    def change(self, site: Site) -> Change | None:
        """The sum of what each adds to a weight."""
        found = [change for run, own in self._with(site) if (change := run.change(own))]
        return Sum(changes=found) if found else None

    def _with(self, site: Site) -> Iterator[tuple[Trained, Site]]:
        for run in (self.first, *self.others):
            yield from ((run, own) for own in run.sites if own.name == site.name)


def _check(run: Trained, first: Trained) -> None:
    if run.manifest["description"]["base"] != first.manifest["description"]["base"]:
        raise UserError(
            f"--plus: {run.path} was trained over {run.base}, which is not the {first.base} of "
            f"{first.path}. Only adapters over one base add up."
        )
    if run.full and run is not first:
        raise UserError(
            f"--plus: {run.path} trained {', '.join(run.manifest['full_modules'])} in full, which "
            "cannot be added. Name that run first."
        )
    for name in ("quantization", "double_quant", "precision"):
        was, own = getattr(first.config.model, name), getattr(run.config.model, name)
        if was != own:
            raise UserError(
                f"--plus: {first.path} was trained with --{name} {was}, {run.path} with {own}. "
                "Only what was trained over the same weights adds up."
            )
    whole = set(first.manifest["full_modules"])
    if both := [site.name for site in run.sites if run is not first and site.name in whole]:
        raise UserError(
            f"--plus: {first.path} trained {both[0]} in full, {run.path} adapts it. They cannot be "
            "added."
        )
    if run.reads_base:
        raise UserError(
            f"--plus: what --method {run.method.name} adds depends on the base's weights. Export "
            "each by itself."
        )
