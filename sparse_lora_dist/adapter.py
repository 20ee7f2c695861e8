"""INJECT: the module that adds a delta to a frozen linear, and putting it there.

Shapes: M rows of a micro-batch, T tokens of a row, I in_features, O out_features.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sparse_lora_dist.base_model.frozen_linear import FrozenLinear
from sparse_lora_dist.methods.base import Method, Site, TensorSpec
from sparse_lora_dist.zero3 import ShardBuilder, Values


@dataclass
class RowSeeds:
    """Which rows the model is looking at; all adapters of a model draw their dropout from one.

    A mask depends on (seed, step, row, site) alone, so neither the number of ranks nor the
    micro-batch size changes it.
    """

    seed: int
    sequence_length: int
    step: int = 0
    rows_M: tuple[int, ...] = field(default=())

    def keep_mask(
        self, x_MTI: Tensor, site: str, rows_M: tuple[int, ...], step: int, dropout: float
    ) -> Tensor:
        """1 / (1 - dropout) where an entry stays and 0 where it is dropped."""
        mask = torch.empty_like(x_MTI)
        # Drawn for a full-length row and cut: a row's mask must not depend on the padding after it.
        full_LI = x_MTI.new_empty(self.sequence_length, x_MTI.shape[-1])
        for m, row in enumerate(rows_M):
            generator = torch.Generator(x_MTI.device).manual_seed(
                seed_of(self.seed, step, row, site)
            )
            mask[m] = full_LI.bernoulli_(1.0 - dropout, generator=generator)[: x_MTI.shape[1]]
        return mask.div_(1.0 - dropout)


def seed_of(*parts: int | str) -> int:
    """A 63-bit seed from anything printable, the same on every machine."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class AdapterLinear(nn.Module):
    """y_TO = base(x_TI) + delta(drop(x_TI)), the delta being the method's."""

    def __init__(
        self,
        base: FrozenLinear,
        site: Site,
        method: Method,
        parameters: dict[str, nn.Parameter],
        *,
        scale: float,
        dropout: float,
        row_seeds: RowSeeds,
    ) -> None:
        super().__init__()
        self.base, self.site, self.method = base, site, method
        self.scale, self.dropout, self.row_seeds = scale, dropout, row_seeds
        for name, parameter in parameters.items():
            self.register_parameter(name, parameter)
        self.tensor_names = tuple(parameters)

    def forward(self, x_MTI: Tensor) -> Tensor:
        tensors = [getattr(self, name) for name in self.tensor_names]
        y_MTO: Tensor = self.base(x_MTI)
        delta_MTO: Tensor = _Delta.apply(x_MTI, self, *tensors)  # type: ignore[no-untyped-call]
        return y_MTO + delta_MTO

    def delta(
        self, x_MTI: Tensor, tensors: Sequence[Tensor], rows_M: tuple[int, ...], step: int
    ) -> Tensor:
        """What this site adds, from whole tensors."""
        if self.training and self.dropout > 0.0:
            x_MTI = x_MTI * self.row_seeds.keep_mask(
                x_MTI, self.site.name, rows_M, step, self.dropout
            )
        return self.method.delta(
            x_MTI, dict(zip(self.tensor_names, tensors, strict=True)), self.scale
        )


class _Delta(torch.autograd.Function):
    """The delta, computed again in backward.

    Two thin matmuls more, against holding every gathered adapter tensor, and every dropout mask,
    from forward to backward.
    """

    @staticmethod
    def forward(ctx: Any, x_MTI: Tensor, layer: AdapterLinear, *tensors: Tensor) -> Tensor:
        ctx.layer, ctx.rows_M, ctx.step = layer, layer.row_seeds.rows_M, layer.row_seeds.step
        ctx.save_for_backward(x_MTI)
        return layer.delta(x_MTI, tensors, ctx.rows_M, ctx.step)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x_MTI,) = ctx.saved_tensors
        layer: AdapterLinear = ctx.layer
        wants_x = ctx.needs_input_grad[0]
        leaves = [getattr(layer, name).detach().requires_grad_() for name in layer.tensor_names]
        with torch.enable_grad():
            x = x_MTI.detach().requires_grad_(wants_x)
            y = layer.delta(x, leaves, ctx.rows_M, ctx.step)
        got = torch.autograd.grad(y, [x, *leaves] if wants_x else leaves, grads[0])
        return (got[0], None, *got[1:]) if wants_x else (None, None, *got)


def inject(
    model: nn.Module,
    sites: Sequence[Site],
    method: Method,
    builder: ShardBuilder,
    row_seeds: RowSeeds,
    *,
    alpha: float,
    dropout: float,
    initial: Mapping[str, Values],
) -> list[AdapterLinear]:
    """Put an adapter at each site and return them. Collective.

    ``initial`` gives first values by "site.tensor"; what it lacks is drawn from (seed, name), so it
    is the same on any number of ranks.
    """
    adapters = []
    for site in sites:
        base = model.get_submodule(site.name)
        assert isinstance(base, FrozenLinear), f"{site.name} was not loaded as a frozen linear"
        parameters = {}
        for key, spec in method.tensors(site).items():
            name = f"{site.name}.{key}"
            values = initial.get(name) or _drawn(spec, seed_of(row_seeds.seed, name))
            parameters[key] = builder.parameter(spec.shape, values, trainable=True)
        adapter = AdapterLinear(
            base,
            site,
            method,
            parameters,
            scale=alpha / site.rank,
            dropout=dropout,
            row_seeds=row_seeds,
        )
        parent, _, leaf = site.name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, adapter)
        adapters.append(adapter)
    return adapters


def _drawn(spec: TensorSpec, seed: int) -> Values:
    """First values that are the same on any number of ranks: drawn whole, then cut."""

    def values(start: int, stop: int) -> Tensor:
        whole = torch.empty(spec.shape)
        spec.init(whole, torch.Generator().manual_seed(seed))
        return whole.flatten()[start:stop]

    return values
