"""The module that adds a delta to a frozen linear.

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
from sparse_lora_dist.base_model.frozen_linear import FrozenLinear, fast_dtype
from sparse_lora_dist.methods.protocol.form import WEIGHT, Site
from sparse_lora_dist.methods.protocol.method import Components, Method
from sparse_lora_dist.zero3.parameters import gathers_too


class AdapterLinear(nn.Module):
    """y_TO = base(x_TI) + delta(drop(x_TI)), the delta being the method's, of its computed
    components."""

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
        """What the probe saw in the backwards of this step, added up."""
        self._penalised = 0
        self.input_statistics: InputStatistics | None = None
        """What looks at its input and its output's gradient in the backwards of this step."""
        self.base_only = False
        """Does the base alone answer?"""
        if self.form.reads_base:
            gathers_too(self, base.parameters())
        self.num_components = self.form.num_components(site)
        self.set_components(
            Components(computed=tuple(range(self.num_components)), open=self.num_components)
        )

    def set_components(self, components: Components) -> None:
        """Compute these from now on."""
        self.components = components
        self.scale = self.form.scale(self.alpha, self.site.rank, components.open)
        self._places = torch.tensor(components.computed, dtype=torch.int64)

    def forward(self, x_MTI: Tensor) -> Tensor:
        tensors = [getattr(self, name) for name in self.specs]
        y_MTO: Tensor = self.base(x_MTI)
        if self.base_only:
            return y_MTO
        delta_MTO: Tensor = _Delta.apply(x_MTI, self, *tensors)  # type: ignore[no-untyped-call]
        delta_MTO += y_MTO  # not the other way round: the base's output is a view of DeepSpeed's
        return delta_MTO

    def dropped(self, x_MTI: Tensor, rows_M: tuple[int, ...], step: int) -> Tensor:
        """What the delta sees of the site's input."""
        if not self.training or self.dropout == 0.0:
            return x_MTI
        mask = self.row_seeds.keep_mask(x_MTI, self.site.name, rows_M, step, self.dropout)
        return x_MTI * mask

    def computed(self, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
        """The computed components of whole tensors, which are in the order of the specs, and what
        the form draws besides."""
        named = dict(zip(self.specs, tensors, strict=True))
        if len(self.components.computed) < self.num_components:
            named = {n: self._slice(t, self.specs[n].component_axis) for n, t in named.items()}
        dtype = tensors[0].dtype
        for key, t in self.kept().items():
            named[key] = t.to(dtype) if t.is_floating_point() else t
        named |= self.form.drawn(self.seed, tensors[0].device)
        if self.form.reads_base:
            named[WEIGHT] = self.base.weight_OI(dtype)
        return named

    def kept(self) -> dict[str, Tensor]:
        """Its kept tensors, while they are whole."""
        return {key: from_bytes(getattr(self, key), spec) for key, spec in self.form.kept.items()}

    def owes_penalty(self, micro_batch: int) -> bool:
        """Once a micro-batch, however often the model calls this linear in it (ALBERT's layers are
        one layer; DeBERTa's linears take positions too). 0, where nobody counts them: always."""
        owes = micro_batch == 0 or micro_batch != self._penalised
        self._penalised = micro_batch
        return owes

    def _slice(self, t: Tensor, axis: int | None) -> Tensor:
        if axis is None:
            return t
        count = len(self.components.computed)
        if self.components.computed == tuple(range(count)):
            return t.narrow(axis, 0, count)  # a view, where ranks grow
        self._places = self._places.to(t.device)  # once a decision
        return t.index_select(axis, self._places)


class _Delta(torch.autograd.Function):
    """The delta, computed again in backward.

    Two thin matmuls more, against holding every gathered adapter tensor, and every dropout mask,
    from forward to backward. And backward is where a site's tensors and its output's gradient are
    whole: what a method adds to the loss gets its gradient here, and its probe looks here.
    """

    @staticmethod
    def forward(ctx: Any, x_MTI: Tensor, layer: AdapterLinear, *tensors: Tensor) -> Tensor:
        ctx.layer, ctx.rows_M, ctx.step = layer, layer.row_seeds.rows_M, layer.row_seeds.step
        ctx.row_metadata = layer.row_seeds.row_metadata()
        ctx.save_for_backward(x_MTI)
        dropped_MTI = layer.dropped(x_MTI, ctx.rows_M, ctx.step)
        return layer.form.delta(dropped_MTI, layer.computed(tensors), layer.scale)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x_MTI,), layer = ctx.saved_tensors, cast(AdapterLinear, ctx.layer)
        wants_x, dtype = ctx.needs_input_grad[0], fast_dtype(x_MTI)
        leaves = [getattr(layer, name).detach().requires_grad_() for name in layer.specs]
        with torch.enable_grad():
            x = x_MTI.detach().requires_grad_(wants_x)
            dropped_MTI = layer.dropped(x, ctx.rows_M, ctx.step).to(dtype)
            tensors = {
                name: t.to(dtype) if t.is_floating_point() else t
                for name, t in layer.computed(leaves).items()
            }
            y = layer.form.delta(dropped_MTI, tensors, layer.scale)
        outputs, gradients = [y], [grads[0].to(dtype)]
        if layer.method.penalty is not None and layer.owes_penalty(layer.row_seeds.micro_batch):
            penalty = layer.method.penalty({k: t.detach() for k, t in tensors.items()})
            outputs += [tensors[name] for name in penalty]
            # Micro-batches add up, ranks are averaged: so it counts once a step.
            gradients += [
                (g / layer.micro_batches).to(tensors[name].dtype) for name, g in penalty.items()
            ]
        if layer.probe is not None:
            seen = {k: t.detach() for k, t in tensors.items()}
            layer.probed += layer.probe(dropped_MTI.detach(), gradients[0], seen, layer.scale)
        if layer.input_statistics is not None:
            layer.input_statistics.add(x_MTI, grads[0], ctx.row_metadata)
        got = torch.autograd.grad(outputs, [x, *leaves] if wants_x else leaves, gradients)
        return (got[0], None, *got[1:]) if wants_x else (None, None, *got)
