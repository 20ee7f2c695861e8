"""Form of a site's delta: its tensors, how they act on the input, and the plain LoRA they equal.

A *delta* is what an adapter adds to the output of its linear. Each field below that is a function
says where it runs:

    local    one linear on one rank, with whole tensors on the rank's device
    shard    any slice of a tensor on one rank, flattened; must be elementwise
    global   the same arguments on all ranks; must return the same bits on all ranks

Shapes: T tokens, I in_features, O out_features, R rank, N entries of a slice.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Tensors = Mapping[str, Tensor]
"""Tensors of one site by their short names, e.g. "lora_a"."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Update:
    """State of an optimizer step, for the entries that a projection gets."""

    step: int
    """Optimizer step, counted from 1."""
    lr: float | Tensor
    """Learning rate, with lr_factor applied; fp32 [N] if entries have different birth steps."""
    denominator: Tensor
    """Adam's sqrt(v_hat) + eps, fp32 [N]."""


Project = Callable[[Tensor, Update], Tensor]
"""(w, update) -> w, fp32 [N] each. Called by `SparseAdamW` inside `step`, after Adam's update.
Runs: shard."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Site:
    """Linear of the base that carries an adapter (PEFT: target module)."""

    name: str
    """Full module name, e.g. "model.layers.3.self_attn.q_proj"."""
    in_features: int
    """I, width of the linear's input."""
    out_features: int
    """O, width of the linear's output."""
    rank: int
    """Value of --rank, the capacity R of methods that choose ranks."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorSpec:
    """Trained tensor of a site: its shape, its initial values, and how the optimizer steps it."""

    shape: tuple[int, ...]
    """Shape of the whole tensor."""
    init: Callable[[Tensor, torch.Generator], None]
    """(t, generator) -> None. Fills the fp32 CPU tensor t of ``shape`` in place. Called by adapter
    injection, once a rank, with a generator seeded alike on all ranks. Runs: global."""
    component_axis: int | None = None
    """Axis along which the site's rank-1 components lie. None: the tensor has no components."""
    lr_factor: float = 1.0
    """Learning-rate multiplier, above 0."""
    decays: bool = True
    """True: --weight_decay applies to this tensor."""
    project: Project | None = None
    """Projection that ends each optimizer update of this tensor's entries. None: no projection."""
    shared: bool = False
    """True: one tensor serves all sites, under the name of the first site."""


@dataclass(frozen=True, kw_only=True, slots=True)
class KeptSpec:
    """Kept tensor of a site: never trained, sharded, saved in checkpoints, zero until the method
    writes it."""

    shape: tuple[int, ...]
    """Shape of the whole tensor."""
    dtype: torch.dtype = torch.float32
    """Dtype of the entries; stored as bytes, whatever the engine's dtype."""

    @property
    def num_bytes(self) -> int:
        """Size of the whole tensor in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def kaiming_uniform(t: Tensor, generator: torch.Generator) -> None:
    """Fill ``t`` with U(-1/sqrt(I), 1/sqrt(I)), I the last axis, as PEFT and loralib do for A."""
    bound = 1.0 / math.sqrt(t.shape[-1])
    t.uniform_(-bound, bound, generator=generator)


def zeros(t: Tensor, generator: torch.Generator) -> None:
    """Fill ``t`` with zeros, so that the delta starts at zero."""
    t.zero_()


def low_rank_pair(site: Site, project: Project | None = None) -> dict[str, TensorSpec]:
    """Return the specs of plain LoRA's pair: lora_a (R x I) random, lora_b (O x R) zero.

    Hu et al. 2021, arXiv:2106.09685, section 4.1. ``project`` ends updates of both tensors.
    """
    a_shape, b_shape = (site.rank, site.in_features), (site.out_features, site.rank)
    return {
        "lora_a": TensorSpec(
            shape=a_shape, init=kaiming_uniform, component_axis=0, project=project
        ),
        "lora_b": TensorSpec(shape=b_shape, init=zeros, component_axis=1, project=project),
    }


def low_rank_delta(x_TI: Tensor, tensors: Tensors, scale: float) -> Tensor:
    """Return y_TO = scale * x A^T B^T."""
    # The scale is applied to the narrow product: R numbers a token, not O.
    return (x_TI @ tensors["lora_a"].t() * scale) @ tensors["lora_b"].t()


def pair_itself(tensors: Tensors) -> tuple[Tensor, Tensor]:
    """Return (a_RI, b_OR), which a low-rank pair has as they are."""
    return tensors["lora_a"], tensors["lora_b"]


def alpha_over_capacity(alpha: float, capacity: int, open_components: int) -> float:
    """Return alpha / R for any number of open components, so that the delta does not jump when a
    component opens or dies."""
    return alpha / capacity


WEIGHT = "weight"
"""Name of w_OI, the dequantised base weight, among the tensors of a form with ``reads_base``."""


def draw_nothing(seed: int, device: torch.device) -> dict[str, Tensor]:
    """Return no drawn tensors."""
    return {}


@dataclass(frozen=True, kw_only=True, slots=True)
class PeftForm:
    """Delta of one site as a PEFT adapter type other than LoRA."""

    kind: str
    """Name of the PEFT type in capitals, e.g. "SHIRA"."""
    tensors: Mapping[str, Tensor]
    """Tensors of the site; a key is what follows the linear's name in PEFT's file."""
    config: Mapping[str, Any]
    """Fields of PEFT's config, the same for all linears."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Form:
    """Delta of one site.

    The ``tensors`` that ``delta``, ``to_lora`` and ``to_peft`` get hold the trained tensors, cut to
    the computed components instead of all R, the kept and drawn tensors whole, and ``WEIGHT`` if
    ``reads_base``. Floating-point tensors have the dtype of x in ``delta``, fp32 in exports.
    """

    tensors: Mapping[str, TensorSpec]
    """Trained tensors of the site."""
    drawn: Callable[[int, torch.device], dict[str, Tensor]] = draw_nothing
    """(seed, device) -> drawn tensors, which never train and are in no checkpoint: the same bits on
    every device. Called by the adapter at every forward and backward, and by exports.
    Runs: local."""
    kept: Mapping[str, KeptSpec] = field(default_factory=dict)
    """Kept tensors of the site, which ``Rewriting.write`` fills and no gradient trains."""
    reads_base: bool = False
    """True: the delta depends on the base weight, which is then among the tensors as ``WEIGHT``."""
    delta: Callable[[Tensor, Tensors, float], Tensor] = low_rank_delta
    """(x_TI, tensors, scale) -> y_TO, what the site adds to the base's output; linear in x. Called
    by the adapter in forward, and in backward with gradients enabled. Runs: local."""
    to_lora: Callable[[Tensors], tuple[Tensor, Tensor]] | None = pair_itself
    """tensors -> (a_RI, b_OR), the plain LoRA pair that gives the same delta at the same scale.
    Called by exports. Runs: local. None: there is no such pair, and exports apply ``delta`` to the
    identity."""
    to_peft: Callable[[Tensors, float], PeftForm] | None = None
    """(tensors, scale) -> the site as a PEFT type other than LoRA. Called by exports. Runs: local.
    None: PEFT has no such type."""
    scale: Callable[[float, int, int], float] = alpha_over_capacity
    """(alpha, --rank, open components) -> scale of the site. Called by the adapter at its start and
    after each change of components. Runs: global."""
    own_rank: int | None = None
    """Maximum number of rank-1 components, R. None: --rank."""

    def num_components(self, site: Site) -> int:
        """Return R, the maximum number of rank-1 components of ``site``, whose form this is."""
        return site.rank if self.own_rank is None else self.own_rank

    @property
    def masks_base(self) -> bool:
        """True if the delta may zero base weights: it reads them and is no low-rank pair."""
        return self.reads_base and self.to_lora is None


def low_rank(site: Site) -> Form:
    """Return the form of plain LoRA."""
    return Form(tensors=low_rank_pair(site))
