"""Rewriting: whole tensors of a site are computed anew at some steps, one site at a time.

A *site* is a linear that carries an adapter. The functions ``write`` and ``measure`` run on rank 0
only, and their results are sent to all ranks. If every rank computed them, two ranks could round
differently, or give a singular vector another sign, and slices of two such results do not fit
together.

Shapes: O out_features, I in_features, N rows (sequences) of a step, S sites, K measures a site.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from sparse_lora_dist.methods.protocol.form import Site, Tensors


@dataclass(frozen=True, kw_only=True, slots=True)
class Whole:
    """One site with all its tensors gathered on rank 0: the argument of ``Rewriting.write`` and
    ``Rewriting.measure``."""

    site: Site
    """The linear whose tensors are rewritten."""
    index: int
    """Index of the site among all sites, in the model's order."""
    step: int
    """Number of optimizer steps done so far; 0 before the first."""
    tensors: Tensors
    """All tensors of the site by short name: trained tensors in fp32 with all components, kept
    tensors in their own dtype, and drawn tensors."""
    scale: float
    """Scale of the site's delta, e.g. alpha / rank."""
    weight_OI: Callable[[], Tensor]
    """Function () -> base weight, fp32 [O, I]. Each call dequantises it again."""
    generator: torch.Generator
    """CPU generator for random values. Its seed follows from the run's seed, the site and the
    step."""
    squares_I: Tensor | None = None
    """Running mean of each squared input feature of the linear, float64 [I]. None: not collected so
    far."""
    gradient_OI: Tensor | None = None
    """Gradient of the step's loss with respect to the base weight, fp32 [O, I]. None: not
    collected."""
    rows_NI: Tensor | None = None
    """For each of the step's N rows (sequences), the mean over its tokens of the linear's input,
    fp32 [N, I], in the order of the data. None: not collected."""
    measures_SK: Tensor | None = None
    """Results of ``Rewriting.measure`` for all sites, float64 [S, K] on the CPU: S sites with K
    numbers each. None: the rewriting has no ``measure``."""


class Share(NamedTuple):
    """Number of a site's entries of some kind, and of all its entries."""

    part: int
    whole: int


def share_of(mask: Tensor) -> Share:
    """Return how many entries of a bool tensor are True, of how many."""
    return Share(int(mask.sum()), mask.numel())


@dataclass(frozen=True, kw_only=True, slots=True)
class Rewritten:
    """Result of ``Rewriting.write``: new values of a site's tensors. Tensors that are not named
    stay as they are."""

    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    """New whole tensors by short name, trained or kept. Tensors that all sites share are not
    allowed."""
    computed: tuple[int, ...] | None = None
    """Indices of the rank-1 components that forward computes from now on; all of them count as
    open. None: the components stay as they are."""
    log_values: Mapping[str, float | Share] = field(default_factory=dict)
    """Numbers for the metrics, by name. The mean over all sites is logged; of shares, the fraction
    of the entries of all sites together."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rewriting:
    """When and how a method rewrites whole tensors of its sites. `Rewriter` calls its functions."""

    at: Callable[[int], bool]
    """Function (step) -> True if sites are rewritten after this step; step 0 is before training.
    Called after each optimizer step. Runs: global."""
    write: Callable[[Whole], Rewritten]
    """Function (whole) -> new values of the site's tensors. Called for one site after another.
    Runs: rank 0."""
    measure: Callable[[Whole], Tensor] | None = None
    """Function (whole) -> K numbers about the site, float64 [K]. Called for all sites before
    ``write`` is called for the first. Runs: rank 0. None: ``Whole.measures_SK`` is None."""
    resets_moments: bool = False
    """True: Adam's moments of the adapters are set to zero after the rewriting. Modules trained in
    full keep theirs, and the learning-rate schedule goes on unchanged."""
    says: bool = False
    """True: log_values are printed on the screen as well as logged."""
    reads_weight: bool = True
    """True: the base weight is gathered, so that ``Whole.weight_OI`` may be called."""
    squares_decay: float | None = None
    """Decay rate of the running mean of squared inputs, in [0, 1). The mean starts at the value of
    the first step. None: squared inputs are not collected."""
    collects_gradient: Callable[[int, int], bool] | None = None
    """Function (step, site index) -> True if this step collects the site's gradient with respect to
    the base weight, in fp32, sharded. Called before the forward of each step. Runs: global. None:
    it is never collected."""
    collects_rows: Callable[[int], bool] | None = None
    """Function (step) -> True if this step collects, for each of its rows (sequences), the mean of
    the linear's input over tokens. Called before the forward of each step. Runs: global. None: no
    step collects them."""
