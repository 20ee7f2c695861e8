"""``AdapterLinear``: a frozen linear plus its delta, which is what the adapter adds to its output.

Shapes: M rows of a micro-batch, T tokens of a row, I in_features, O out_features.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from sparse_lora_dist.adapter.dropout import RowSeeds
from sparse_lora_dist.adapter.input_statistics import InputStatistics
from sparse_lora_dist.adapter.kept_tensors import from_bytes
from sparse_lora_dist.adapter.seeds import seed_of
from sparse_lora_dist.base_model.frozen_linear import (
    FrozenLinear,
    fast_dtype,
    input_gradient_of,
    output_of,
)
from sparse_lora_dist.distributed.device import moved
from sparse_lora_dist.methods.protocol.form import WEIGHT, Site, draw_nothing, low_rank_delta
from sparse_lora_dist.methods.protocol.method import Components, Method
from sparse_lora_dist.zero3.parameters import gathers_too

SMALL_BYTES = 2**16
"""Most bytes of a site's drawn tensors that are kept instead of drawn at each use. Larger ones,
such as the outer matrices of LoRA-Mini, are drawn anew because their memory is what counts."""


class AdapterLinear(nn.Module):
    """A frozen linear with its adapter: output = base(x) + delta(dropout(x)).

    The ``Form`` of the method defines the delta. In most methods it is a sum of rank-1 components
    (row i of A with column i of B); only those that ``set_components`` names are computed. Forward
    and backward are collective, since ZeRO-3 gathers the parameters for each.

    Args:
        base: frozen linear of the model.
        site: name, sizes and rank of the linear.
        method: sparse method of the run.
        parameters: key of a tensor within the site, such as "lora_a" -> sharded parameter, for all
            trained tensors and all kept tensors (which the method writes and no gradient trains).
        alpha: LoRA alpha.
        dropout: probability with which an entry of the delta's input is dropped, in [0, 1).
        row_seeds: source of the dropout masks, shared by all adapters of the model.
        micro_batches: number of micro-batches of an optimizer step on one rank.
    """

    def __init__(
        self,
        base: FrozenLinear,
        site: Site,
        method: Method,
        parameters: dict[str, nn.Parameter],
        *,
        alpha: float,
        dropout: float,
        row_seeds: RowSeeds,
        micro_batches: int = 1,
    ) -> None:
        super().__init__()
        self.base, self.site, self.method = base, site, method
        self.alpha, self.dropout, self.row_seeds = alpha, dropout, row_seeds
        self.micro_batches = micro_batches
        self.form = method.form(site)
        self.specs = self.form.tensors
        self.seed = seed_of(row_seeds.seed, site.name)
        for name, parameter in parameters.items():
            self.register_parameter(name, parameter)
        self.probe = method.probe
        self.probed: Tensor | float = 0.0
        """Sum of the method's probe over this step's backwards on this rank; 0.0 before them. The
        probe is a number that the method computes of the site in each backward."""
        self._penalised_micro_batch = 0
        self.input_statistics: InputStatistics | None = None
        """Statistics that this step's backwards collect; None if the step needs none."""
        self._small_drawn: tuple[torch.device, dict[str, Tensor]] | None = None
        self.base_only = False
        """True: forward returns the output of the frozen linear without the delta."""
        gathers_too(self, base.parameters())
        self.num_components = self.form.num_components(site)
        self.set_components(
            Components(computed=tuple(range(self.num_components)), open=self.num_components)
        )

    def set_components(self, components: Components) -> None:
        """Set the components that forward computes, and the delta's scale that follows from them.

        All ranks must pass the same. Takes effect at the next forward.

        Args:
            components: indices of the rank-1 components that forward computes, and the number of
                open ones, which count towards the site's rank.
        """
        self.components = components
        self.scale = self.form.scale(self.alpha, self.site.rank, components.open)
        device = getattr(self, next(iter(self.specs))).device
        (self._computed_indices,) = moved(device, torch.tensor(components.computed).long())
        form = self.form
        self._has_trained_only = (
            not (form.kept or form.reads_base)
            and form.drawn is draw_nothing
            and len(components.computed) == self.num_components
        )
        self.is_plain_pair = (
            form.delta is low_rank_delta
            and list(self.specs) == ["lora_a", "lora_b"]
            and self._has_trained_only
            and self.method.penalty is None
            and self.probe is None
        )
        """True: the delta is plain LoRA's, and the method wants nothing else of backward."""

    def forward(self, x_MTI: Tensor) -> Tensor:
        if self.base_only:
            return cast(Tensor, self.base(x_MTI))
        tensors = [getattr(self, name) for name in self.specs]
        y_MTO: Tensor = _AdaptedMatmul.apply(x_MTI, self, *tensors)  # type: ignore[no-untyped-call]
        return y_MTO

    def mask(self, x_MTI: Tensor, rows_M: tuple[int, ...], step: int) -> Tensor | None:
        """Return what dropout multiplies the site's input with; None in eval mode or without it.

        Args:
            x_MTI: input of the site.
            rows_M: ``RowSeeds.rows_M`` of the micro-batch that ``x_MTI`` comes from.
            step: optimizer step, counted from 1, that ``x_MTI`` comes from.
        """
        if not self.training or self.dropout == 0.0:
            return None
        return self.row_seeds.keep_mask(x_MTI, self.site.name, rows_M, step, self.dropout)

    def computed(self, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
        """Return all tensors that ``Form.delta`` takes. ZeRO-3 must have gathered them.

        Args:
            tensors: the site's trained tensors, gathered, in the order of ``self.specs``.

        Returns:
            Key of a tensor within the site -> tensor. The dict has the trained tensors, cut to the
            components that forward computes; the kept tensors, which no gradient trains; the
            tensors drawn anew from a seed; and the frozen weight if the form reads it. The weight
            and floating-point kept tensors are in the dtype of ``tensors``.
        """
        named = dict(zip(self.specs, tensors, strict=True))
        if self._has_trained_only:
            return named
        if len(self.components.computed) < self.num_components:
            named = {n: self._slice(t, self.specs[n].component_axis) for n, t in named.items()}
        dtype = tensors[0].dtype
        for key, t in self.kept().items():
            named[key] = t.to(dtype) if t.is_floating_point() else t
        named |= self._drawn(tensors[0].device)
        if self.form.reads_base:
            named[WEIGHT] = self.base.weight_OI(dtype)
        return named

    def _drawn(self, device: torch.device) -> dict[str, Tensor]:
        """Return the drawn tensors. Small ones, such as indices, are kept from the first use on."""
        if self._small_drawn is not None and self._small_drawn[0] == device:
            return self._small_drawn[1]
        drawn = self.form.drawn(self.seed, device)
        if sum(t.nbytes for t in drawn.values()) <= SMALL_BYTES:
            self._small_drawn = device, drawn
        return drawn

    def kept(self) -> dict[str, Tensor]:
        """Return key -> kept tensor of the site, of the dtype and shape of its spec.

        ZeRO-3 must have gathered their parameters.
        """
        return {key: from_bytes(getattr(self, key), spec) for key, spec in self.form.kept.items()}

    def adds_penalty(self, micro_batch: int) -> bool:
        """Return True if this backward of the site is the first of its micro-batch.

        The first one adds the gradient of the method's penalty. A model may call one linear several
        times in a forward: ALBERT runs the same layer again and again, and DeBERTa's linears take
        relative positions too. The penalty must be added once.

        Args:
            micro_batch: ``RowSeeds.micro_batch``, the number of the current micro-batch. It is
                stored for the next call. 0 means that micro-batches are not counted; then every
                call returns True.
        """
        is_first = micro_batch == 0 or micro_batch != self._penalised_micro_batch
        self._penalised_micro_batch = micro_batch
        return is_first

    def _slice(self, t: Tensor, axis: int | None) -> Tensor:
        if axis is None:
            return t
        count = len(self.components.computed)
        if self.components.computed == tuple(range(count)):
            return t.narrow(axis, 0, count)  # a view: the usual case where ranks grow
        return t.index_select(axis, self._computed_indices)


class _AdaptedMatmul(torch.autograd.Function):
    """Autograd function of a site: the output of the frozen linear plus the delta.

    Backward computes the delta once more. That costs two thin matmuls. In return, gathered adapter
    tensors and dropout masks need not stay in memory from forward to backward. Backward has the
    site's gathered tensors and the gradient of its output, so it also computes the gradient of the
    method's penalty, the method's probe (one number of the site), and the input statistics.
    """

    @staticmethod
    def forward(ctx: Any, x_MTI: Tensor, layer: AdapterLinear, *tensors: Tensor) -> Tensor:
        ctx.layer, ctx.rows_M, ctx.step = layer, layer.row_seeds.rows_M, layer.row_seeds.step
        ctx.row_metadata = layer.row_seeds.row_metadata()
        ctx.save_for_backward(x_MTI)
        y_MTO = output_of(layer.base, x_MTI)
        mask = layer.mask(x_MTI, ctx.rows_M, ctx.step)
        dropped_MTI = x_MTI if mask is None else x_MTI * mask
        y_MTO.add_(layer.form.delta(dropped_MTI, layer.computed(tensors), layer.scale))
        # A linear with a bias returns a view. Autograd would not let the model change that in
        # place, as Longformer does.
        return torch.ops.aten._unsafe_view(y_MTO, y_MTO.shape) if y_MTO._is_view() else y_MTO

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x_MTI,), (grad_MTO,), layer = ctx.saved_tensors, grads, cast(AdapterLinear, ctx.layer)
        gradients = _of_pair if layer.is_plain_pair else _of_any_delta
        grad_MTI, *of_tensors = gradients(ctx, x_MTI, grad_MTO)
        if layer.input_statistics is not None:
            layer.input_statistics.add(x_MTI, grad_MTO, ctx.row_metadata)
        if grad_MTI is not None:
            grad_MTI = input_gradient_of(layer.base, grad_MTO).add_(grad_MTI)
        return grad_MTI, None, *of_tensors


def _of_pair(ctx: Any, x_MTI: Tensor, grad_MTO: Tensor) -> list[Tensor | None]:
    """Return the gradients of the input, of A and of B of a plain low-rank pair.

    y = s (x A^T) B^T     g_B = g^T (s x A^T)     g_A = (s g B)^T x     g_x = (s g B) A
    """
    layer, dtype, kept = ctx.layer, fast_dtype(x_MTI), x_MTI.dtype
    mask = layer.mask(x_MTI, ctx.rows_M, ctx.step)
    a_RI, b_OR = (getattr(layer, name).detach().to(dtype) for name in layer.specs)
    x_TI = (x_MTI if mask is None else x_MTI * mask).flatten(0, -2).to(dtype)
    g_TO = grad_MTO.flatten(0, -2).to(dtype)
    narrow_TR = (g_TO @ b_OR) * layer.scale
    grad_b = g_TO.t() @ (x_TI @ a_RI.t() * layer.scale)
    grad_a = narrow_TR.t() @ x_TI
    grad_MTI = None
    if ctx.needs_input_grad[0]:
        grad_MTI = (narrow_TR @ a_RI).view(x_MTI.shape).to(kept)
        grad_MTI = grad_MTI if mask is None else grad_MTI.mul_(mask)
    return [grad_MTI, grad_a.to(kept), grad_b.to(kept)]


def _of_any_delta(ctx: Any, x_MTI: Tensor, grad_MTO: Tensor) -> list[Tensor | None]:
    """Return the gradients of the input and of the trained tensors, as autograd finds them when the
    delta is computed again; those of the method's penalty are added. Adds to the probe."""
    layer, dtype, wants_x = ctx.layer, fast_dtype(x_MTI), ctx.needs_input_grad[0]
    mask = layer.mask(x_MTI, ctx.rows_M, ctx.step)
    leaves = [getattr(layer, name).detach().requires_grad_() for name in layer.specs]
    with torch.enable_grad():
        x = x_MTI.detach().requires_grad_(wants_x)
        dropped_MTI = (x if mask is None else x * mask).to(dtype)
        tensors = {
            name: t.to(dtype) if t.is_floating_point() else t
            for name, t in layer.computed(leaves).items()
        }
        y = layer.form.delta(dropped_MTI, tensors, layer.scale)
    outputs, gradients = [y], [grad_MTO.to(dtype)]
    if layer.method.penalty is not None and layer.adds_penalty(layer.row_seeds.micro_batch):
        penalty = layer.method.penalty({k: t.detach() for k, t in tensors.items()})
        outputs += [tensors[name] for name in penalty]
        # Gradients are summed over micro-batches and averaged over ranks: one penalty per step.
        gradients += [
            (g / layer.micro_batches).to(tensors[name].dtype) for name, g in penalty.items()
        ]
    if layer.probe is not None:
        seen = {k: t.detach() for k, t in tensors.items()}
        layer.probed += layer.probe(dropped_MTI.detach(), gradients[0], seen, layer.scale)
    got = torch.autograd.grad(outputs, [x, *leaves] if wants_x else leaves, gradients)
    return [*got] if wants_x else [None, *got]
