"""Rewriting: whole tensors of a site are computed anew at some steps, one site at a time.

`write` and `measure` run on rank 0 only, and all ranks take its result: two ranks could round
differently, or give a singular vector another sign, and slices of two such results do not fit.

Shapes: O out_features, I in_features, N rows of a step, S sites, K measures a site.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sparse_lora_dist.methods.protocol.form import Site, Tensors


@dataclass(frozen=True, kw_only=True, slots=True)
class Whole:
    """Site with all its tensors gathered on rank 0."""

    site: Site
    """Linear that is rewritten."""
    index: int
    """Index of the site among all sites, in the model's order."""
    step: int
    """Number of optimizer steps done; 0 before the first."""
    tensors: Tensors
    """Trained tensors in fp32 with all components, kept tensors in their own dtype, and drawn
    tensors."""
    scale: float
    """Scale of the site's delta."""
    weight_OI: Callable[[], Tensor]
    """() -> base weight, fp32 [O, I], dequantised anew at each call."""
    generator: torch.Generator
    """CPU generator for random values, seeded by run, site and step."""
    squares_I: Tensor | None = None
    """Running mean of the squared input features, float64 [I]. None: none collected yet."""
    gradient_OI: Tensor | None = None
    """Gradient of the step's loss by the base weight, fp32 [O, I]. None: not collected."""
    rows_NI: Tensor | None = None
    """Mean input of each row of the step, fp32 [N, I], in the order of the data. None: not
    collected."""
    measures_SK: Tensor | None = None
    """Results of ``Rewriting.measure`` for all sites, float64 [S, K] on the CPU. None: not
    measured."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rewritten:
    """New content of a site. Tensors that are not named do not change."""

    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    """Trained or kept tensors of this site by short name, whole; shared tensors are not allowed."""
    computed: tuple[int, ...] | None = None
    """Components that forward computes from now on, all of them open. None: no change."""
    log_values: Mapping[str, float] = field(default_factory=dict)
    """Numbers for the metrics; the mean over all sites is logged."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rewriting:
    """Schedule and functions of a method that rewrites whole tensors. Called by `Rewriter`."""

    at: Callable[[int], bool]
    """step -> True if sites are rewritten after this step; step 0 is before the first. Called after
    each optimizer step. Runs: global."""
    write: Callable[[Whole], Rewritten]
    """whole -> new content of the site. Called for one site after another. Runs: rank 0."""
    measure: Callable[[Whole], Tensor] | None = None
    """whole -> K numbers, float64 [K]. Called for all sites before the first is written. Runs: rank
    0. None: nothing is measured."""
    resets_moments: bool = False
    """True: Adam's moments of all entries are reset after it; the learning rate is unaffected."""
    says: bool = False
    """True: log_values are printed on the screen too."""
    reads_weight: bool = True
    """True: the base weight is gathered, and ``Whole.weight_OI`` may be called."""
    squares_decay: float | None = None
    """Decay rate of the running mean of squared inputs, in [0, 1); the first step counts in full.
    None: squares are not collected."""
    collects_gradient: Callable[[int, int], bool] | None = None
    """(step, site index) -> True if the gradient by the base weight is collected in this step, in
    fp32, sharded. Called before the forward of each step. Runs: global. None: never."""
    collects_rows: Callable[[int], bool] | None = None
    """step -> True if the mean inputs of the step's rows are collected. Called before the forward
    of each step. Runs: global. None: never."""
