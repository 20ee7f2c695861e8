"""Form of a site's delta: its tensors, how they act on the input, and the plain LoRA pair that
gives the same delta.

A *site* is an ``nn.Linear`` of the base that carries an adapter (PEFT: target module). A *delta* is
what an adapter adds to the output of its linear. Each field below that is a function says where it
runs:

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
    """Facts about one optimizer step that a projection, the function ``TensorSpec.project``, may
    read."""

    step: int
    """Number of the optimizer step, counted from 1."""
    lr: float | Tensor
    """Learning rate of the tensor, its ``TensorSpec.lr_factor`` included: one number, or fp32 [N]
    if the N entries of the slice became trainable at different steps and so have different learning
    rates."""
    denominator: Tensor
    """Adam's sqrt(v_hat) + eps for each of the N entries of the slice, fp32 [N]."""


Project = Callable[[Tensor, Update], Tensor]
"""Function (w, update) -> w that replaces the weights of a slice, fp32 [N], after Adam's update.
Called by `SparseAdamW` on each rank inside ``step``. Runs: shard, so it must be elementwise."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Site:
    """Linear of the base that carries an adapter (PEFT: target module)."""

    name: str
    """Full module name, e.g. "model.layers.3.self_attn.q_proj"."""
    in_features: int
    """Width of the linear's input, written I in shapes."""
    out_features: int
    """Width of the linear's output, written O in shapes."""
    rank: int
    """Value of --rank, written R in shapes: the largest number of rank-1 components that the site
    can have, unless ``Form.own_rank`` is set."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorSpec:
    """Trained tensor of a site: its shape, its initial values, and how the optimizer steps it."""

    shape: tuple[int, ...]
    """Shape of the whole tensor."""
    init: Callable[[Tensor, torch.Generator], None]
    """Function (t, generator) -> None that fills ``t``, an fp32 CPU tensor of ``shape``, in place.
    Called by adapter injection once per rank, with a generator that has the same seed on all ranks.
    Runs: global."""
    component_axis: int | None = None
    """Axis along which the site's rank-1 components lie, e.g. 0 for A [R, I], whose row i belongs
    to component i. None: the tensor has no components."""
    lr_factor: float = 1.0
    """Factor by which the run's learning rate is multiplied for this tensor, above 0."""
    decays: bool = True
    """True: --weight_decay applies to this tensor."""
    project: Project | None = None
    """Function that changes this tensor's entries after each optimizer update, such as a clamp.
    None: nothing follows Adam's update."""
    shared: bool = False
    """True: all sites use this one tensor. Its full name begins with the name of the model's first
    site."""


@dataclass(frozen=True, kw_only=True, slots=True)
class KeptSpec:
    """Spec of a kept tensor: a tensor of a site that the method writes and no gradient trains, e.g.
    a mask.

    It is sharded over the ranks, saved in checkpoints, and zero until it is first written.
    """

    shape: tuple[int, ...]
    """Shape of the whole tensor."""
    dtype: torch.dtype = torch.float32
    """Dtype of the entries. They are stored as raw bytes, so the engine's precision does not change
    them."""

    @property
    def num_bytes(self) -> int:
        """Size of the whole tensor in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def kaiming_uniform(t: Tensor, generator: torch.Generator) -> None:
    """Fill ``t`` in place from U(-1/sqrt(n), 1/sqrt(n)), where n is the length of its last axis.

    PEFT and loralib initialise A (R x I, so n = I) in this way.

    Args:
        t: Tensor to fill, fp32 on the CPU.
        generator: Source of the random values.
    """
    bound = 1.0 / math.sqrt(t.shape[-1])
    t.uniform_(-bound, bound, generator=generator)


def zeros(t: Tensor, generator: torch.Generator) -> None:
    """Fill ``t`` in place with zeros; used for B, so that the delta starts at zero.

    Args:
        t: Tensor to fill.
        generator: Unused; every ``TensorSpec.init`` has this argument.
    """
    t.zero_()


def low_rank_pair(site: Site, project: Project | None = None) -> dict[str, TensorSpec]:
    """Return the specs of plain LoRA's two tensors, A and B.

    Source: Hu et al. 2021, arXiv:2106.09685, section 4.1.

    Args:
        site: The linear that is adapted.
        project: Function that changes the entries of both tensors after each optimizer step.
            None: the entries stay as the optimizer wrote them.

    Returns:
        {short name: spec}: ``lora_a`` is [site.rank, in_features] with random initial values;
            ``lora_b`` is [out_features, site.rank] and starts at zero.
    """
    a_shape, b_shape = (site.rank, site.in_features), (site.out_features, site.rank)
    return {
        "lora_a": TensorSpec(
            shape=a_shape, init=kaiming_uniform, component_axis=0, project=project
        ),
        "lora_b": TensorSpec(shape=b_shape, init=zeros, component_axis=1, project=project),
    }


def low_rank_delta(x_TI: Tensor, tensors: Tensors, scale: float) -> Tensor:
    """Return plain LoRA's delta, what it adds to the linear's output: scale * x A^T B^T.

    Args:
        x_TI: Input of the linear, [T tokens, in_features].
        tensors: Tensors of the site; ``lora_a`` is A [R, I] and ``lora_b`` is B [O, R].
        scale: Scale of the delta, alpha / rank in plain LoRA.

    Returns:
        The delta, [T, out_features], in the dtype of ``x_TI``.
    """
    # The scale is applied to the narrow product: R numbers a token, not O.
    return (x_TI @ tensors["lora_a"].t() * scale) @ tensors["lora_b"].t()


def pair_itself(tensors: Tensors) -> tuple[Tensor, Tensor]:
    """Return ``(lora_a, lora_b)`` unchanged, [R, I] and [O, R]: the tensors are a LoRA pair
    already."""
    return tensors["lora_a"], tensors["lora_b"]


def alpha_over_capacity(alpha: float, capacity: int, open_components: int) -> float:
    """Return alpha / capacity, the scale of a site's delta.

    Args:
        alpha: Value of --alpha.
        capacity: Value of --rank, also for a form that sets ``own_rank``.
        open_components: Number of components that are open now. It is ignored, so that the delta
            does not jump when a component opens or closes.
    """
    return alpha / capacity


WEIGHT = "weight"
"""Key of the dequantised base weight, [O, I], in the dict of tensors that a form's functions get if
its ``reads_base`` is True."""


def draw_nothing(seed: int, device: torch.device) -> dict[str, Tensor]:
    """Return an empty dict: the default of ``Form.drawn``, for forms without drawn tensors.

    Args:
        seed: Unused.
        device: Unused.
    """
    return {}


@dataclass(frozen=True, kw_only=True, slots=True)
class PeftForm:
    """Delta of one site, stored as a PEFT adapter type other than LoRA."""

    kind: str
    """Name of the PEFT type in capitals, e.g. "SHIRA"."""
    tensors: Mapping[str, Tensor]
    """Tensors of the site in PEFT's file. A key is the part of the file's key after the linear's
    name."""
    config: Mapping[str, Any]
    """Fields of PEFT's adapter_config.json, the same for all sites."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Form:
    """How a site computes its delta, what the adapter adds to the output of the linear.

    The functions ``delta``, ``to_lora`` and ``to_peft`` get a dict of tensors by short name.
    Trained tensors in it are cut to the components that forward computes (see
    ``Components.computed``). Kept and drawn tensors are whole. The key ``WEIGHT`` is there if
    ``reads_base`` is True. Floating-point tensors have the dtype of x in ``delta`` and are fp32 in
    exports.
    """

    tensors: Mapping[str, TensorSpec]
    """Specs of the site's trained tensors, by short name."""
    drawn: Callable[[int, torch.device], dict[str, Tensor]] = draw_nothing
    """Function (seed, device) -> drawn tensors by short name. A drawn tensor is computed from the
    seed at each use, with the same bits on every device; it is never trained and no checkpoint has
    it. Called by the adapter in every forward and backward, and by exports. Runs: local."""
    kept: Mapping[str, KeptSpec] = field(default_factory=dict)
    """Specs of the site's kept tensors, by short name. The method writes them in
    ``Rewriting.write``; no gradient trains them."""
    reads_base: bool = False
    """True: the delta depends on the base weight, which is passed to it under the key
    ``WEIGHT``."""
    delta: Callable[[Tensor, Tensors, float], Tensor] = low_rank_delta
    """Function (x_TI, tensors, scale) -> y_TO, what is added to the linear's output; linear in x.
    Called by the adapter in forward, and again in backward with gradients enabled. Runs: local."""
    to_lora: Callable[[Tensors], tuple[Tensor, Tensor]] | None = pair_itself
    """Function (tensors) -> (a_RI, b_OR), the plain LoRA pair that gives the same delta at the same
    scale. Called by exports. Runs: local. None: there is no such pair, and exports compute the
    update of the weight, [O, I], by applying ``delta`` to the identity matrix."""
    to_peft: Callable[[Tensors, float], PeftForm] | None = None
    """Function (tensors, scale) -> the site stored as a PEFT adapter type other than LoRA. Called
    by exports. Runs: local. None: PEFT has no such type."""
    scale: Callable[[float, int, int], float] = alpha_over_capacity
    """Function (alpha, --rank, open components) -> scale of the site's delta. Called by the adapter
    at its start and after each change of components. Runs: global."""
    own_rank: int | None = None
    """Capacity of the site if it differs from --rank: the largest number of rank-1 components that
    it can have. None: --rank."""

    def num_components(self, site: Site) -> int:
        """Return the capacity of ``site``, the largest number of rank-1 components that it can
        have.

        Args:
            site: The site that this form was built for.
        """
        return site.rank if self.own_rank is None else self.own_rank

    @property
    def masks_base(self) -> bool:
        """True if the delta may prune base weights, by subtracting their values from them.

        Every form that reads the base weight and has no LoRA pair counts as such.
        """
        return self.reads_base and self.to_lora is None


def low_rank(site: Site) -> Form:
    """Return the form of plain LoRA at ``site``: A and B, with the delta scale * x A^T B^T."""
    return Form(tensors=low_rank_pair(site))
