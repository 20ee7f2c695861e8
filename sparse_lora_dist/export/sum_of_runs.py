"""Adds the adapters of several runs over one base (``--plus``).

The factors A and B of LoRA updates are concatenated along the rank:

    s1 B1 A1 + s2 B2 A2 = s1 [B1, s2/s1 B2] [A1; A2]

where A1, B1 and A2, B2 are the factors of two runs, and s1 and s2 are the runs' alpha / --rank.
Updates that are not low-rank are added as dense matrices.

Shapes: O out_features, I in_features, L number of rank-1 components with a nonzero update.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from sparse_lora_dist.distributed.console import print_line
from sparse_lora_dist.errors import UserError
from sparse_lora_dist.export.peft_adapter import Pair
from sparse_lora_dist.export.peft_own_type import OwnType
from sparse_lora_dist.export.trained_run import Trained
from sparse_lora_dist.export.weight_change import WeightChange
from sparse_lora_dist.methods import Method
from sparse_lora_dist.methods.protocol.form import Site
from sparse_lora_dist.model.prompting import Prompting, with_ends
from sparse_lora_dist.model.saved_class import SavedClass
from sparse_lora_dist.run_folder.identity import BASE, NOT_STORED, Identity, in_words


@dataclass(frozen=True, kw_only=True)
class SummedChange:
    """The sum of several runs' updates of one weight.

    It implements the protocol ``WeightChange``, which documents the methods.
    """

    changes: Sequence[WeightChange]
    """The updates to add, at least one, all with the same shape."""

    @property
    def shape(self) -> tuple[int, int]:
        return self.changes[0].shape

    def rows(self, start: int, stop: int) -> Tensor:
        first, *others = (change.rows(start, stop) for change in self.changes)
        return sum(others, start=first)

    @property
    def max_changed(self) -> int:
        rows, columns = self.shape
        return min(sum(c.max_changed for c in self.changes), rows * columns)

    @property
    def norm(self) -> float:
        return float(self.rows(0, self.shape[0]).double().norm())


@dataclass(frozen=True, kw_only=True)
class Union(Trained):
    """The sum of the updates of several runs over one base, which can be exported like one run.

    Each run keeps its own scale alpha / rank. The config, the checkpoint path and the modules
    trained in full are those of the first run.
    """

    first: Trained
    """The run that the others are added to."""
    others: tuple[Trained, ...]
    """The runs named by ``--plus``."""

    @classmethod
    def of(cls, first: Trained, sources: Sequence[str]) -> "Union":
        """Return the sum of runs, after checking that they can be added.

        Args:
            first: The run that the others are added to.
            sources: Run folders or checkpoint folders of the others. Of a run folder, the newest
                intact checkpoint is used.

        Raises:
            UserError: A checkpoint is missing or damaged, or the runs cannot be added.
        """
        others = tuple(Trained.open(Path(source)) for source in sources)
        for run in (first, *others):
            _check_can_add(run, first)
        for run in others:
            _compare_templates(run, first)
        own = {f.name: getattr(first, f.name) for f in fields(Trained)}
        return cls(**own, first=first, others=others)

    @cached_property
    def sites(self) -> tuple[Site, ...]:
        """Linears with an adapter in any of the runs, each once.

        Those of the first run come first, then those that only other runs have.
        """
        found: dict[str, Site] = {}
        for run in (self.first, *self.others):
            found = {site.name: site for site in run.sites} | found
        return tuple(found.values())

    @cached_property
    def method(self) -> Method:
        """The method of the first run."""
        return self.first.method

    @cached_property
    def full(self) -> tuple[str, ...]:
        """Names of the parameters that the first run trained in full; other runs have none."""
        return self.first.full

    @cached_property
    def prompting(self) -> Prompting | None:
        """How the first run with prompts was prompted, with the tokens that end an answer in any
        of the runs. Runs that edit facts have none."""
        runs = (self.first, *self.others)
        known = [run.prompting for run in runs if run.prompting is not None]
        if not known:
            return None
        own, ends = known[0], {token: i for one in known for token, i in one.ends.items()}
        learned = tuple(dict.fromkeys(token for one in known for token in one.learned_ends))
        generation = with_ends(own.generation, ends.values())
        return replace(own, ends=ends, learned=learned, generation=generation)

    @cached_property
    def saved_class(self) -> SavedClass | None:
        """Class of the base that the first run saved, with the names of the linears of all runs."""
        found = [run.saved_class for run in (*self.others, self.first)]
        known = [one for one in found if one is not None]
        names = {ours: theirs for one in known for ours, theirs in one.modules.items()}
        return replace(known[-1], modules=names) if known else None

    @property
    def is_lora(self) -> bool:
        """True if the update of every run is a LoRA at every site."""
        return self.first.is_lora and all(run.is_lora for run in self.others)

    @property
    def masks_base(self) -> bool:
        """Always false: runs that set weights of the base to zero cannot be added."""
        return False

    def own_type(self) -> OwnType | None:
        """Return None, because a sum of runs cannot be written as another PEFT type than LoRA."""
        return None

    def pair(self, site: Site, dtype: torch.dtype = torch.float32) -> Pair | None:
        """Return the summed LoRA of a linear: the factors of all runs, concatenated along the rank.

        The caller multiplies the pair by the first run's scale, so B of every further run is
        multiplied here by (scale of that run) / (scale of the first run).

        Args:
            site: The linear, one of ``sites``.
            dtype: Dtype that the fp32 master weights of A and B are rounded to first.

        Returns:
            (A [L, I], B [O, L]), where L is the number of components with a nonzero update over all
            runs. They are fp32, because rounding B times a ratio to ``dtype`` would be a second
            rounding. None if no run changes the linear's weight.

        Raises:
            NoPair: The update of a run is not a low-rank product.
        """
        found = []
        for run, own in self._runs_with(site):
            if pair := run.pair(own, dtype):
                found.append((pair[0].float(), pair[1].float() * (run.scale / self.scale)))
        if not found:
            return None
        return torch.cat([a_LI for a_LI, _ in found]), torch.cat([b_OL for _, b_OL in found], dim=1)

    def change(self, site: Site) -> WeightChange | None:
        """Return the summed update of a linear's weight; None if no run changes it.

        Args:
            site: The linear, one of ``sites``.
        """
        found = [change for run, own in self._runs_with(site) if (change := run.change(own))]
        return SummedChange(changes=found) if found else None

    def _runs_with(self, site: Site) -> Iterator[tuple[Trained, Site]]:
        """Yield (run, the run's own ``Site``) for each run with an adapter on the linear ``site``.

        The ``Site`` objects of the runs may differ in their rank.
        """
        for run in (self.first, *self.others):
            yield from ((run, own) for own in run.sites if own.name == site.name)


def _check_can_add(run: Trained, first: Trained) -> None:
    """Raise UserError if the adapter of a run cannot be part of a sum.

    Args:
        run: The run to check: ``first``, or one of the runs named by ``--plus``.
        first: The run that the others are added to.
    """
    if differ := _differences_of_bases(run, first):
        raise UserError(
            f"--plus cannot add {run.path}, which was trained over {run.base}, to {first.path}, "
            f"which was trained over another model, {first.base}. What differs: {differ}. Only "
            "adapters over the same base can be added. Leave this run out."
        )
    if run.full and run is not first:
        advice = (
            "The run to export has such modules too: export each by itself."
            if first.full
            else "Name it first, as the run to export, and give the other runs to --plus."
        )
        raise UserError(
            f"--plus cannot add {run.path}, which trained "
            f"{', '.join(run.manifest['full_modules'])} in full: such modules cannot be added. "
            f"{advice}"
        )
    for name in ("quantization", "double_quant", "precision"):
        was, own = getattr(first.config.model, name), getattr(run.config.model, name)
        if was != own:
            raise UserError(
                f"--plus cannot add {run.path}, trained with --{name} {own}, to {first.path}, "
                f"trained with --{name} {was}. Only runs over the same base weights can be added. "
                "Leave this run out."
            )
    whole = set(first.manifest["full_modules"])
    if both := [site.name for site in run.sites if run is not first and site.name in whole]:
        raise UserError(
            f"--plus cannot add {run.path}, which has an adapter on {both[0]}, to {first.path}, "
            "which trained that module in full. Export each run by itself."
        )
    if run.reads_base:
        raise UserError(
            f"--plus cannot add runs of --method {run.method.name}, because their update depends "
            "on the base's weights. Export each run by itself."
        )


def _compare_templates(run: Trained, first: Trained) -> None:
    """Print a note if a run was trained with another chat template than the first."""
    if None in (run.prompting, first.prompting):
        return
    one, other = (p.chat_template for p in (run.prompting, first.prompting) if p is not None)
    if one != other:
        print_line(
            "note",
            f"{run.path} was trained with another chat template than {first.path}. The export has "
            "that of the latter",
        )


def _differences_of_bases(run: Trained, first: Trained) -> str:
    """Return what differs between the bases of two runs, in words; "" if nothing does."""
    own, others = (Identity.of_checkpoint(r.manifest) for r in (run, first))
    if None not in (own.weights, others.weights):
        return in_words(own.differences(others, only=BASE))
    if run.manifest["description"]["base"] != first.manifest["description"]["base"]:
        return "config.json or the headers of the weight files"
    if run is not first:
        print_line("note", f"{(run if own.weights is None else first).path} {NOT_STORED}")
    return ""
