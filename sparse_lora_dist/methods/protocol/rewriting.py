"""When a method writes tensors of its sites anew, and what it may know for it.

Shapes: O out_features, I in_features, N rows of a step, S sites, K measures a site.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sparse_lora_dist.methods.protocol.form import Site, Tensors


@dataclass(frozen=True, kw_only=True, slots=True)
class Whole:
    """A site while all of it is there."""

    site: Site
    index: int
    """Of the site among all."""
    step: int
    """The optimizer steps that are done."""
    tensors: Tensors
    """In fp32 what it trains, all components; what is kept, as it is."""
    scale: float
    weight_OI: Callable[[], Tensor]
    """The base's, in fp32, made anew at each call."""
    generator: torch.Generator
    """For what is drawn, seeded by run, site and step; on the CPU."""
    squares_I: Tensor | None = None
    """Running mean of the squares of each feature of its input, float64."""
    gradient_OI: Tensor | None = None
    """Of the step's loss by the base's weight, fp32."""
    rows_NI: Tensor | None = None
    """The mean input of each row of the step, fp32, in the order of the stream."""
    measures_SK: Tensor | None = None
    """What ``measure`` said of every site, float64."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rewritten:
    """What is not named stays as it was."""

    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    """Trained or kept ones of this site, whole; not shared ones."""
    computed: tuple[int, ...] | None = None
    """The components that it computes from now on, all of them open."""
    log_values: Mapping[str, float] = field(default_factory=dict)
    """What the log says of it, in the mean over sites."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rewriting:
    """All of it sees whole tensors of a site at a time, on rank 0, whose answer all ranks take."""

    at: Callable[[int], bool]
    """Is it done after this step? 0: before the first."""
    write: Callable[[Whole], Rewritten]
    measure: Callable[[Whole], Tensor] | None = None
    """K numbers of every site, before any is written."""
    resets_moments: bool = False
    """Do all moments start anew after it? The learning rate goes on as it was."""
    says: bool = False
    """Are its log_values told on the screen too?"""
    reads_weight: bool = True
    """Does it ask for the base's weight?"""
    squares_decay: float | None = None
    """Of the running mean of squared inputs: this much of the old one stays at each step, and all
    of the first. None: it is not taken."""
    collects_gradient: Callable[[int, int], bool] | None = None
    """(step, index of a site) -> is the gradient by its base's weight taken in this step? It is
    held in shares, in fp32."""
    collects_rows: Callable[[int], bool] | None = None
    """step -> are mean inputs of its rows taken?"""
