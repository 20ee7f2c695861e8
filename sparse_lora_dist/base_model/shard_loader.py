"""Load a base model's files into a model sharded by ZeRO-3. Each rank loads its own shards.

The model is built on the meta device, where nothing is allocated. Then each parameter is replaced
by a sharded one. A rank reads only the ranges of the files that its own shards need, and quantises
the weights of linear layers and experts. From other ranks it receives only the scales of their
blocks, 1/16 byte for each weight. Weights that the files already hold in 4 bits are read without
change.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from math import prod
from typing import Any

from torch import Tensor, nn

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
from sparse_lora_dist.distributed.console import with_progress
from sparse_lora_dist.errors import UserError
from sparse_lora_dist.zero3.parameters import ShardBuilder
from sparse_lora_dist.zero3.slices import Values, own_range


@dataclass
class LoadReport:
    """Amounts of data that this rank read and received while it loaded the base model."""

    linear_bytes_in_file: int = 0
    """Size in the files, in bytes, of all weights that the model holds in 4 bits."""
    linear_bytes_read: int = 0
    """Bytes that this rank read of the weights that the model holds in 4 bits."""
    other_bytes_read: int = 0
    """Bytes that this rank read of all other parameters."""
    bytes_received: int = 0
    """Bytes that this rank received from other ranks, all of them scales."""
    unquantized: dict[str, int] = field(default_factory=dict)
    """Dict: name of a linear layer or other weight that stays in the engine's dtype, although
    others are held in 4 bits -> bytes of the whole weight. Empty if nothing is to be in 4 bits."""
    experts: int = 0
    """Number of experts that the model holds in 4 bits, over all layers."""


@dataclass(frozen=True, slots=True)
class _Job:
    """One step of loading: ranges of the files to read, and a function to call with the result.

    Most jobs create one parameter. The last job of a linear layer or of an experts module reads
    nothing, and replaces the module by one that has the new parameters.
    """

    ranges: list[Range]
    finish: Callable[[list[Tensor]], None]
    """Function that is called with the tensors read, one for each of ``ranges``."""


class ShardLoader:
    """Replaces the parameters of a meta model by sharded ones, one parameter at a time.

    Args:
        files: the opened safetensors files of the base model.
        sources: dict from the name of each parameter to where the files hold it.
        builder: object that creates the sharded parameters.
        quantize: True to quantise linear layers and experts to NF4 if the files hold floats.
        double_quant: True to quantise their scales too.
        initial: values of fully trained parameters that do not come from the files, such as a new
            classification head: dict from a parameter's name to a function of (start, stop) that
            returns a range of its flattened values.

    Attributes:
        report: amounts of data that this rank read and received, filled by ``load``.
    """

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
        self.files, self.sources, self.builder, self.initial = files, sources, builder, initial
        self.quantize, self.double_quant = quantize, double_quant
        self.report = LoadReport()
        # Keyed by the id of the meta parameter, so that tied parameters stay tied. The meta
        # parameter is kept too, so that its id is not reused.
        self._made: dict[int, tuple[Tensor, nn.Parameter]] = {}

    def load(self, model: nn.Module, *, keep: Collection[str], train: Collection[str]) -> None:
        """Replace every parameter of a model by a sharded one, and read the buffers. Collective.

        Args:
            model: the model on the meta device. Linear layers and experts in it are replaced by
                frozen ones (``FrozenLinear``, ``QuantLinear``, ``QuantExperts``).
            keep: names of linear layers that are not quantised, such as the output head. They are
                frozen.
            train: names of modules that are trained in full (``--modules_to_save``). They keep
                their class, and their parameters are trainable.

        Raises:
            UserError: a file cannot be read, or a module of ``train`` is in 4 bits in the files.
        """
        received = comm.traffic_bytes.total()
        jobs = [
            job
            for name, module in list(model.named_modules())
            for job in self._jobs(model, name, module, keep, train)
        ]
        ranges = [r for job in jobs for r in job.ranges]
        reads = read_ahead(self.files, ranges, self.builder.device)
        for job in with_progress(jobs, "loading"):
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
        """Yield the jobs that load a module's own parameters, without those of its children.

        Args:
            model: the whole model.
            name: name of the module in the model.
            module: the module.
            keep: names of linear layers that are not quantised.
            train: names of modules that are trained in full.
        """
        if isinstance(module, nn.Linear) and is_plain_linear(module) and name not in train:
            yield from self._linear(model, name, module, quantize=name not in keep)
        elif is_experts(module) and self._in_4_bits(f"{name}.down_proj"):
            yield from self._experts(model, name, module)
        else:
            for leaf, parameter in list(module.named_parameters(recurse=False)):
                full = f"{name}.{leaf}" if name else leaf
                put = partial(setattr, module, leaf)
                yield self._parameter(full, parameter, put, trainable=name in train)
                # Weights of modules that are neither linear layers nor experts stay unquantised.
                is_weight = parameter.dim() > 1 and not isinstance(module, nn.Embedding)
                if is_weight and name not in train:
                    self._note_unquantized(full, parameter)

    def _linear(
        self, model: nn.Module, name: str, linear: nn.Linear, *, quantize: bool
    ) -> Iterator[_Job]:
        """Yield the jobs that load weight and bias, and then the job that replaces the layer.

        Args:
            model: the whole model.
            name: name of the layer in the model.
            linear: the layer on the meta device.
            quantize: False if the layer must not be quantised here. It may still be in 4 bits, if
                the files hold it so.
        """
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
        """Yield the jobs that load the two weight stacks, and the job that replaces the experts.

        Args:
            model: the whole model.
            name: name of the experts module in the model.
            experts: the experts module on the meta device.
        """
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
        """Return the layout of a weight that is in 4 bits in the files or will be quantised.

        If several tensors of the files make the weight, each is quantised by itself. A tensor that
        is a stack of matrices is quantised matrix by matrix.
        """
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
        """Return the job that loads a parameter in the engine's dtype.

        A parameter that several modules share (tied weights) is created once and assigned to each
        of them.

        Args:
            name: name of the parameter in the model.
            meta: the parameter on the meta device.
            put: function that assigns the new parameter to its module.
            trainable: True if the parameter gets gradients.
        """
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
                f"{self.files.folder} holds {name} in 4 bits, but only frozen linear layers and "
                "experts may be in 4 bits. Leave its module out of --modules_to_save, or give a "
                "--model with the original weights.",
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
        """Return a function that loads a weight in 4 bits, or quantises it from floats.

        Args:
            name: name of the weight in the model.
            layout: layout of the weight.
            put: function that is called with the tuple of the two new parameters (packed bytes,
                scales).
        """
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
        """Fill the model's buffers that the files hold, such as a router's bias, on every rank."""
        persistent = model.state_dict().keys()
        for name, buffer in model.named_buffers():
            source = self.sources.get(name)
            if name in persistent and isinstance(source, Source):
                whole = self.files.read(source, 0, buffer.numel())
                buffer.copy_(whole.view(buffer.shape))


EXPERT_WEIGHTS = ("gate_up_proj", "down_proj")
"""Names of the two weight stacks of an experts module in transformers."""


def is_plain_linear(module: nn.Module) -> bool:
    """Return True if the class is nn.Linear itself. A subclass may compute something else."""
    return type(module) is nn.Linear


def is_experts(module: nn.Module) -> bool:
    """Return True if ``module`` looks like an experts module of transformers.

    The parameters of such a module are the two weight stacks gate_up_proj and down_proj, both 3-D,
    and no other.
    """
    weights = dict(module.named_parameters(recurse=False))
    return weights.keys() == set(EXPERT_WEIGHTS) and all(w.dim() == 3 for w in weights.values())


def _replace(model: nn.Module, name: str, new: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, new)
