"""INJECT: the module that adds a delta to a frozen linear, and putting it there.

Shapes: M rows of a micro-batch, T tokens of a row, I in_features, O out_features.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from sparse_lora_dist.adapter.input_statistics import Looked, Watch
from sparse_lora_dist.base_model.frozen_linear import FrozenLinear, fast_dtype
from sparse_lora_dist.base_model.nf4_shard import clothes_for
from sparse_lora_dist.methods.protocol.form import WEIGHT, KeptSpec, Site, TensorSpec
from sparse_lora_dist.methods.protocol.method import Method, Pieces
from sparse_lora_dist.zero3.engine import ShardBuilder, gathers_too
from sparse_lora_dist.zero3.shares import Values


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
    lengths_M: tuple[int, ...] = field(default=())
    """Tokens of each of them, at its front; what follows is padding."""
    num_positions: int | None = None
    """T of the micro-batch; None takes any input for one of its rows."""
    micro_batch: int = 0
    """How many there were."""

    def begin(
        self, rows_M: tuple[int, ...], lengths_M: tuple[int, ...], *, num_positions: int
    ) -> None:
        """The model looks at these rows from now on."""
        self.rows_M, self.lengths_M, self.num_positions = rows_M, lengths_M, num_positions
        self.micro_batch += 1

    def looked(self) -> Looked:
        """What of them outlives a forward."""
        return Looked(
            rows_M=self.rows_M, lengths_M=self.lengths_M, num_positions=self.num_positions
        )

    def keep_mask(
        self, x: Tensor, site: str, rows_M: tuple[int, ...], step: int, dropout: float
    ) -> Tensor:
        """1 / (1 - dropout) where an entry of ``x`` stays and 0 where it is dropped.

        ``x`` is [M, T, I], [M * T, I], [M, I] where one token stands for each row, or of no row.
        """
        if x.dim() == 2 and len(x) == len(rows_M) * (self.num_positions or 0):
            x_MTI = x.view(len(rows_M), -1, x.shape[1])
            return self.keep_mask(x_MTI, site, rows_M, step, dropout).view_as(x)
        mask = torch.empty_like(x)
        if not self._is_of_rows(x, rows_M):
            generator = torch.Generator(x.device).manual_seed(seed_of(self.seed, step, site))
            return mask.bernoulli_(1.0 - dropout, generator=generator).div_(1.0 - dropout)
        # Drawn for a full-length row and cut: a row's mask must not depend on the padding after it.
        full_LI = x.new_empty(self.sequence_length, x.shape[-1])
        for m, row in enumerate(rows_M):
            generator = torch.Generator(x.device).manual_seed(seed_of(self.seed, step, row, site))
            full_LI.bernoulli_(1.0 - dropout, generator=generator)
            mask[m] = full_LI[: x.shape[1]] if x.dim() == 3 else full_LI[0]
        return mask.div_(1.0 - dropout)

    def _is_of_rows(self, x: Tensor, rows_M: tuple[int, ...]) -> bool:
        """DeBERTa's linears also take the table of relative positions, the same for all rows."""
        if x.dim() == 3 and self.num_positions is not None and x.shape[1] != self.num_positions:
            return False
        return x.shape[0] == len(rows_M)


def seed_of(*parts: int | str) -> int:
    """A 63-bit seed from anything printable, the same on every machine."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class AdapterLinear(nn.Module):
    """y_TO = base(x_TI) + delta(drop(x_TI)), the delta being the method's, of its computed
    pieces."""

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
        self.watch: Watch | None = None
        """What looks at its input and its output's gradient in the backwards of this step."""
        self.silent = False
        """Does the base alone answer?"""
        if self.form.reads_base:
            gathers_too(self, base.parameters())
        self.num_pieces = self.form.num_pieces(site)
        self.set_pieces(Pieces(computed=tuple(range(self.num_pieces)), open=self.num_pieces))

    def set_pieces(self, pieces: Pieces) -> None:
        """Compute these from now on."""
        self.pieces = pieces
        self.scale = self.form.scale(self.alpha, self.site.rank, pieces.open)
        self._places = torch.tensor(pieces.computed, dtype=torch.int64)

    def forward(self, x_MTI: Tensor) -> Tensor:
        tensors = [getattr(self, name) for name in self.specs]
        y_MTO: Tensor = self.base(x_MTI)
        if self.silent:
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
        """The computed pieces of whole tensors, which are in the order of the specs, and what the
        form draws besides."""
        named = dict(zip(self.specs, tensors, strict=True))
        if len(self.pieces.computed) < self.num_pieces:
            named = {n: self._slice(t, self.specs[n].piece_axis) for n, t in named.items()}
        dtype = tensors[0].dtype
        for key, t in self.kept().items():
            named[key] = t.to(dtype) if t.is_floating_point() else t
        named |= self.form.drawn(self.seed, tensors[0].device)
        if self.form.reads_base:
            named[WEIGHT] = self.base.weight_OI(dtype)
        return named

    def kept(self) -> dict[str, Tensor]:
        """Its kept tensors, while they are whole."""
        return {key: undressed(getattr(self, key), spec) for key, spec in self.form.kept.items()}

    def owes_penalty(self, micro_batch: int) -> bool:
        """Once a micro-batch, however often the model calls this linear in it (ALBERT's layers are
        one layer; DeBERTa's linears take positions too). 0, where nobody counts them: always."""
        owes = micro_batch == 0 or micro_batch != self._penalised
        self._penalised = micro_batch
        return owes

    def _slice(self, t: Tensor, axis: int | None) -> Tensor:
        if axis is None:
            return t
        count = len(self.pieces.computed)
        if self.pieces.computed == tuple(range(count)):
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
        ctx.looked = layer.row_seeds.looked()
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
        if layer.watch is not None:
            layer.watch.look(x_MTI, grads[0], ctx.looked)
        got = torch.autograd.grad(outputs, [x, *leaves] if wants_x else leaves, gradients)
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
    micro_batches: int,
    initial: Mapping[str, Values],
) -> list[AdapterLinear]:
    """Put an adapter at each site and return them. Collective.

    ``initial`` gives first values by "site.tensor"; what it lacks is drawn from (seed, name), so it
    is the same on any number of ranks.
    """
    adapters: list[AdapterLinear] = []
    for site in sites:
        base = model.get_submodule(site.name)
        assert isinstance(base, FrozenLinear), f"{site.name} was not loaded as a frozen linear"
        form, parameters = method.form(site), {}
        for key, spec in form.tensors.items():
            if spec.shared and adapters:
                parameters[key] = getattr(adapters[0], key)
                continue
            name = f"{site.name}.{key}"
            values = initial.get(name) or _drawn(spec, seed_of(row_seeds.seed, name))
            parameters[key] = builder.parameter(spec.shape, values, trainable=True)
        for key, kept in form.kept.items():
            shape = (clothes_for(kept.num_bytes, builder.dtype),)
            parameters[key] = builder.parameter(shape, _nothing, in_memory=True)
        adapter = AdapterLinear(
            base,
            site,
            method,
            parameters,
            alpha=alpha,
            dropout=dropout,
            row_seeds=row_seeds,
            micro_batches=micro_batches,
        )
        parent, _, leaf = site.name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, adapter)
        adapters.append(adapter)
    return adapters


def _nothing(start: int, stop: int) -> Tensor:
    return torch.zeros(stop - start)


def undressed(parameter: Tensor, spec: KeptSpec) -> Tensor:
    """From the bytes that are gathered. A copy, but of single bytes: the view of wider entries
    must not begin anywhere."""
    raw = parameter.data.view(torch.uint8)[: spec.num_bytes]
    return (raw if spec.dtype.itemsize == 1 else raw.clone()).view(spec.dtype).view(spec.shape)


def _drawn(spec: TensorSpec, seed: int) -> Values:
    """First values that are the same on any number of ranks: drawn whole, then cut."""

    def values(start: int, stop: int) -> Tensor:
        whole = torch.empty(spec.shape)
        spec.init(whole, torch.Generator().manual_seed(seed))
        return whole.flatten()[start:stop]

    return values
