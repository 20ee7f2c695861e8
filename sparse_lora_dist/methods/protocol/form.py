"""What a site's delta is: the tensors that it trains, how they act on its input, and which plain
LoRA that is.

Shapes: T tokens, I in_features, O out_features, R rank.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class Update:
    """What a projection may know of the optimizer step that it ends, for the entries it gets."""

    step: int
    lr: float | Tensor
    """Learning rate; one an entry where entries of different age live together."""
    denominator: Tensor
    """Adam's sqrt(v_hat) + eps of each entry."""


Project = Callable[[Tensor, Update], Tensor]
"""(w, update) -> w. Elementwise, so exact on any shard; runs inside ``optimizer.step``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Site:
    """One linear of the base that carries a delta."""

    name: str
    in_features: int
    out_features: int
    rank: int


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorSpec:
    """A trained tensor of a site: its shape, its first values, how its entries are stepped."""

    shape: tuple[int, ...]
    init: Callable[[Tensor, torch.Generator], None]
    """Fills an fp32 tensor of ``shape`` in place, from a seeded generator."""
    component_axis: int | None = None
    """The axis along which the site's rank-1 components lie. None: it has no components."""
    lr_factor: float = 1.0
    """Its learning rate, in those of the run."""
    decays: bool = True
    """Does the run's weight decay hold for it?"""
    project: Project | None = None
    """What ends an update of its entries."""
    shared: bool = False
    """Is it one for all sites? Then it bears the name of the first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class KeptSpec:
    """A tensor of a site that never trains: sharded, saved with the run, zero until the method
    writes it."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32

    @property
    def num_bytes(self) -> int:
        """Of all its entries."""
        return math.prod(self.shape) * self.dtype.itemsize


def kaiming_uniform(t: Tensor, generator: torch.Generator) -> None:
    """U(-1/sqrt(I), 1/sqrt(I)) with I the last axis: what PEFT and loralib give A."""
    bound = 1.0 / math.sqrt(t.shape[-1])
    t.uniform_(-bound, bound, generator=generator)


def zeros(t: Tensor, generator: torch.Generator) -> None:
    """Zero, so that the delta starts at nothing."""
    t.zero_()


def low_rank_pair(site: Site, project: Project | None = None) -> dict[str, TensorSpec]:
    """A (R x I) random, B (O x R) zero: Hu et al. 2021, arXiv:2106.09685, section 4.1."""
    a_shape, b_shape = (site.rank, site.in_features), (site.out_features, site.rank)
    return {
        "lora_a": TensorSpec(
            shape=a_shape, init=kaiming_uniform, component_axis=0, project=project
        ),
        "lora_b": TensorSpec(shape=b_shape, init=zeros, component_axis=1, project=project),
    }


def low_rank_delta(x_TI: Tensor, tensors: Tensors, scale: float) -> Tensor:
    """y_TO = scale * x A^T B^T"""
    # Scaled where it is narrow: R numbers a token, not O.
    return (x_TI @ tensors["lora_a"].t() * scale) @ tensors["lora_b"].t()


def pair_itself(tensors: Tensors) -> tuple[Tensor, Tensor]:
    """(a_RI, b_OR) of the plain LoRA that gives the same delta."""
    return tensors["lora_a"], tensors["lora_b"]


def alpha_over_capacity(alpha: float, capacity: int, open_components: int) -> float:
    """alpha / R, whatever is open: a delta does not jump when a component is opened or dies."""
    return alpha / capacity


WEIGHT = "weight"
"""Under this name a form that reads the base finds w_OI, while it is there."""


def draw_nothing(seed: int, device: torch.device) -> dict[str, Tensor]:
    """All that there is trains."""
    return {}


@dataclass(frozen=True, kw_only=True, slots=True)
class PeftForm:
    """A delta that is no LoRA as PEFT itself knows it."""

    kind: str
    """PEFT's name of the type, in capitals."""
    tensors: Mapping[str, Tensor]
    """By what follows the linear's name in PEFT's file."""
    config: Mapping[str, Any]
    """Of all linears alike."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Form:
    """Of one site. ``delta`` and ``to_lora`` see the computed components of its tensors only, in
    place of all R, and what is kept, drawn or read besides."""

    tensors: Mapping[str, TensorSpec]
    """Those that it trains."""
    drawn: Callable[[int, torch.device], dict[str, Tensor]] = draw_nothing
    """(seed, device) -> tensors that never train: made anew at every use, the same wherever, and in
    no checkpoint."""
    kept: Mapping[str, KeptSpec] = field(default_factory=dict)
    """Those that the method writes, and no gradient."""
    reads_base: bool = False
    """Is the delta one of the base's weight too? It is then among the tensors, as ``WEIGHT``."""
    delta: Callable[[Tensor, Tensors, float], Tensor] = low_rank_delta
    """(x_TI, tensors, scale) -> y_TO, what the site adds to the base's output."""
    to_lora: Callable[[Tensors], tuple[Tensor, Tensor]] | None = pair_itself
    """tensors -> (a_RI, b_OR), the plain LoRA pair of the same scale that is exported; None: there
    is none, and exports ask ``delta``, linear in x, what it makes of the identity."""
    to_peft: Callable[[Tensors, float], PeftForm] | None = None
    """(tensors, scale) -> the same as a type of PEFT's own; None: it has none."""
    scale: Callable[[float, int, int], float] = alpha_over_capacity
    """(alpha, --rank, open components) -> the site's scale."""
    own_rank: int | None = None
    """Its rank-1 components at most, R; None: --rank."""

    def num_components(self, site: Site) -> int:
        """Of the site whose form this is."""
        return site.rank if self.own_rank is None else self.own_rank

    @property
    def masks_base(self) -> bool:
        """Is what it adds no LoRA, and one of the base's weights: so that it may take some away?"""
        return self.reads_base and self.to_lora is None


def low_rank(site: Site) -> Form:
    """Plain LoRA's."""
    return Form(tensors=low_rank_pair(site))
