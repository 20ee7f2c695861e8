"""Safetensors on disk -> a transformers model of which this rank holds its own ZeRO-3 share.

The model is built on the meta device, so nothing is allocated; then every parameter is replaced by
a sharded one whose share is read, and for linears and experts quantised, by its owner alone. What a
rank needs but did not compute, the scales of other ranks' blocks, comes from them: 1/16 byte a
weight, and only while loading. What is quantised in the files already is read as it is.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from math import prod
from typing import Any

from torch import Tensor, nn
from tqdm import tqdm

from sparse_lora_dist.base_model import nf4
from sparse_lora_dist.base_model.frozen_linear import FrozenLinear, QuantLinear
from sparse_lora_dist.base_model.nf4_shard import (
    QuantLinearParameters,
    bytes_parameter,
    own_bytes,
    own_weights,
    quantized_parameters,
)
from sparse_lora_dist.base_model.prefetch import Range, read_ahead
from sparse_lora_dist.base_model.quant_experts import QuantExperts
from sparse_lora_dist.base_model.safetensors_reader import CheckpointFiles, Source
from sparse_lora_dist.base_model.weight_map import Packed, Sources
from sparse_lora_dist.distributed import comm
from sparse_lora_dist.errors import UserError
from sparse_lora_dist.zero3.parameters import ShardBuilder
from sparse_lora_dist.zero3.shares import Values, own_range


@dataclass
class LoadReport:
    """What loading cost this rank, in bytes."""

    linear_bytes_in_file: int = 0
    linear_bytes_read: int = 0
    """Of the weights that are held in 4 bits."""
    other_bytes_read: int = 0
    bytes_received: int = 0
    """From other ranks: scales only."""
    unquantized: dict[str, int] = field(default_factory=dict)
    """Linear -> its bytes, of those that stay in the engine's dtype."""
    experts: int = 0
    """Experts that were quantised, of all layers."""


@dataclass(frozen=True, slots=True)
class _Job:
    """What is read for one parameter, and what is made of it."""

    ranges: list[Range]
    finish: Callable[[list[Tensor]], None]


class ShardLoader:
    """Fills a meta model from ``files``, one parameter at a time."""

    def __init__(
        self,
        files: CheckpointFiles,
        sources: Sources,
        builder: ShardBuilder,
        *,
        quantize: bool,
        double_quant: bool,
        initial: Mapping[str, Values],
    ) -> None:
        """``quantize``: to NF4, what the files hold as floats; ``initial``: values of modules
        trained in full that come from elsewhere, by name."""
        self.files, self.sources, self.builder, self.initial = files, sources, builder, initial
        self.quantize, self.double_quant = quantize, double_quant
        self.report = LoadReport()
        # By id of the meta parameter, so that tied ones stay tied; kept, so that its id is.
        self._made: dict[int, tuple[Tensor, nn.Parameter]] = {}

    def load(self, model: nn.Module, *, keep: Collection[str], train: Collection[str]) -> None:
        """Replace every parameter of ``model``. Collective.

        Args:
            keep: linears that are not quantised (the output head).
            train: modules trained in full: left as they are, with trainable parameters.
        """
        received = comm.traffic_bytes.total()
        jobs = [
            job
            for name, module in list(model.named_modules())
            for job in self._jobs(model, name, module, keep, train)
        ]
        ranges = [r for job in jobs for r in job.ranges]
        reads = read_ahead(self.files, ranges, self.builder.device)
        for job in tqdm(jobs, desc="loading", leave=False, disable=comm.rank() != 0):
            job.finish([next(reads) for _ in job.ranges])
        self._read_buffers(model)
        self.report.bytes_received = comm.traffic_bytes.total() - received

    def _jobs(
        self,
        model: nn.Module,
        name: str,
        module: nn.Module,
        keep: Collection[str],
        train: Collection[str],
    ) -> Iterator[_Job]:
        """The jobs of the parameters that are this module's own, not its children's."""
        if isinstance(module, nn.Linear) and is_plain_linear(module) and name not in train:
            yield from self._linear(model, name, module, quantize=name not in keep)
        elif is_experts(module) and self._in_4_bits(f"{name}.down_proj"):
            yield from self._experts(model, name, module)
        else:
            for leaf, parameter in list(module.named_parameters(recurse=False)):
                full = f"{name}.{leaf}" if name else leaf
                put = partial(setattr, module, leaf)
                yield self._parameter(full, parameter, put, trainable=name in train)
                # Weights of other kinds stay as they are.
                is_weight = parameter.dim() > 1 and not isinstance(module, nn.Embedding)
                if is_weight and name not in train:
                    self._note_unquantized(full, parameter)

    def _linear(
        self, model: nn.Module, name: str, linear: nn.Linear, *, quantize: bool
    ) -> Iterator[_Job]:
        """Its weight, its bias, and the frozen linear that takes its place."""
        weight = f"{name}.weight"
        made: dict[str, Any] = {"bias": None}
        new: Callable[[], FrozenLinear]
        if linear.bias is not None:
            yield self._parameter(f"{name}.bias", linear.bias, partial(made.__setitem__, "bias"))
        if self._in_4_bits(weight, quantize=quantize):
            layout = self._layout(weight)
            yield self._quantized(weight, layout, partial(made.__setitem__, "weight"))
            new = lambda: QuantLinear(layout, made["weight"], made["bias"])  # noqa: E731
        else:
            sizes = linear.in_features, linear.out_features
            self._note_unquantized(name, linear.weight)
            yield self._parameter(weight, linear.weight, partial(made.__setitem__, "weight"))
            new = lambda: FrozenLinear(*sizes, made["weight"], made["bias"])  # noqa: E731
        yield _Job([], lambda _: _replace(model, name, new()))

    def _experts(self, model: nn.Module, name: str, experts: Any) -> Iterator[_Job]:
        """Their two stacks of weights, and the experts that take their place."""
        made: dict[str, QuantLinearParameters] = {}
        layouts = {leaf: self._layout(f"{name}.{leaf}") for leaf in EXPERT_WEIGHTS}
        for leaf, layout in layouts.items():
            put = partial(made.__setitem__, leaf)
            yield self._quantized(f"{name}.{leaf}", layout, put)
        count = experts.down_proj.shape[0]
        self.report.experts += count
        build = partial(QuantExperts, count, experts.act_fn, layouts, made)
        yield _Job([], lambda _: _replace(model, name, build()))

    def _in_4_bits(self, name: str, *, quantize: bool = True) -> bool:
        return isinstance(self.sources.get(name), Packed) or (self.quantize and quantize)

    def _layout(self, name: str) -> nf4.Layout:
        """That of the files, or the one to quantise to: each tensor of the files by itself, or each
        matrix of a stack."""
        source = self.sources[name]
        if isinstance(source, Packed):
            return source.layout
        *stack, rows, columns = source.shapes[0]
        count = prod(stack) * len(source.parts)
        return nf4.Layout(shape=(rows, columns), count=count, double_quant=self.double_quant)

    def _parameter(
        self,
        name: str,
        meta: Tensor,
        put: Callable[[nn.Parameter], None],
        *,
        trainable: bool = False,
    ) -> _Job:
        """A parameter in the engine's dtype; a tied one is made once, and put twice."""
        make = partial(self.builder.parameter, tuple(meta.shape), trainable=trainable)
        if id(meta) in self._made:
            return _Job([], lambda _: put(self._made[id(meta)][1]))
        self._made[id(meta)] = (meta, nn.Parameter(meta))

        def finish(values: Values) -> None:
            self._made[id(meta)] = (meta, make(values))
            put(self._made[id(meta)][1])

        if name in self.initial:
            return _Job([], lambda _: finish(self.initial[name]))
        source = self.sources[name]
        if isinstance(source, Packed):
            raise UserError(
                f"{self.files.folder} holds {name} in 4 bits, which only linears that stay frozen "
                "may have: leave it out of --modules_to_save, or use the original weights.",
                shared=True,
            )
        own = Range(source, *own_range(meta.numel()))

        def convert(raw: list[Tensor]) -> None:
            (values,) = raw
            self.report.other_bytes_read += values.nbytes
            finish(lambda start, stop: values.to(self.builder.dtype))

        return _Job([own], convert)

    def _quantized(
        self, name: str, layout: nf4.Layout, put: Callable[[QuantLinearParameters], None]
    ) -> _Job:
        """Packed bytes and scales, from floats or as the files have them."""
        source, builder = self.sources[name], self.builder
        if isinstance(source, Packed):
            stored = (source.packed, source.scales)
            ranges = [Range(s, *own_bytes(s.nbytes, builder.dtype)) for s in stored]
        else:
            ranges = [Range(source, *own_weights(layout, builder.dtype))]
        self.report.linear_bytes_in_file += sum(r.source.nbytes for r in ranges)

        def finish(raw: list[Tensor]) -> None:
            self.report.linear_bytes_read += sum(t.nbytes for t in raw)
            if isinstance(source, Packed):
                packed, scales = raw
                put(
                    (
                        bytes_parameter(packed, layout.packed_bytes, builder),
                        bytes_parameter(scales, layout.scale_bytes, builder),
                    )
                )
            else:
                put(quantized_parameters(raw.pop(), layout, builder))

        return _Job(ranges, finish)

    def _note_unquantized(self, name: str, weight: Tensor) -> None:
        if self.quantize or any(isinstance(s, Packed) for s in self.sources.values()):
            self.report.unquantized[name] = weight.numel() * self.builder.dtype.itemsize

    def _read_buffers(self, model: nn.Module) -> None:
        """Buffers that the checkpoint holds, a router's bias say: small, whole on every rank."""
        persistent = model.state_dict().keys()
        for name, buffer in model.named_buffers():
            source = self.sources.get(name)
            if name in persistent and isinstance(source, Source):
                whole = self.files.read(source, 0, buffer.numel())
                buffer.copy_(whole.view(buffer.shape))


EXPERT_WEIGHTS = ("gate_up_proj", "down_proj")


def is_plain_linear(module: nn.Module) -> bool:
    """nn.Linear itself: a subclass may compute something else with its weight."""
    return type(module) is nn.Linear


def is_experts(module: nn.Module) -> bool:
    """Experts whose weights are two stacks of matrices."""
    weights = dict(module.named_parameters(recurse=False))
    return weights.keys() == set(EXPERT_WEIGHTS) and all(w.dim() == 3 for w in weights.values())


def _replace(model: nn.Module, name: str, new: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, new)
