"""Safetensors on disk -> a transformers model of which this rank holds its own ZeRO-3 share.

The model is built on the meta device, so nothing is allocated; then every parameter is replaced by
a sharded one whose share is read, and for linears quantised, by its owner alone. What a rank needs
but did not compute, the scales of other ranks' blocks, comes from them: 1/16 byte a weight, and
only while loading.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn
from tqdm import tqdm

from sparse_lora_dist import comm
from sparse_lora_dist.base_model import nf4
from sparse_lora_dist.base_model.checkpoint_files import CheckpointFiles
from sparse_lora_dist.base_model.frozen_linear import FrozenLinear, QuantLinear
from sparse_lora_dist.base_model.quantized_share import QuantLinearParameters, quantized_parameters
from sparse_lora_dist.zero3 import ShardBuilder, Values


@dataclass
class LoadReport:
    """What loading cost this rank, in bytes."""

    linear_bytes_in_file: int = 0
    linear_bytes_read: int = 0
    """Of the weights that were quantised."""
    other_bytes_read: int = 0
    bytes_received: int = 0
    """From other ranks: scales only."""
    unquantized: dict[str, int] = field(default_factory=dict)
    """Linear -> its bytes, of those that stay in the engine's dtype."""


class ShardLoader:
    """Fills a meta model from ``files``, one parameter at a time."""

    def __init__(
        self,
        files: CheckpointFiles,
        builder: ShardBuilder,
        *,
        quantize: bool,
        double_quant: bool,
        initial: Mapping[str, Values],
    ) -> None:
        """``initial``: values of modules trained in full that come from elsewhere, by name."""
        self.files, self.builder, self.initial = files, builder, initial
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
        modules = list(model.named_modules())
        for name, module in tqdm(modules, desc="loading", leave=False, disable=comm.rank() != 0):
            if is_plain_linear(module) and name not in train:
                quantize = self.quantize and name not in keep
                _replace(model, name, self._linear(name, module, quantize=quantize))
            else:
                self._own_parameters(name, module, trainable=name in train)
        self._read_buffers(model)
        self.report.bytes_received = comm.traffic_bytes.total() - received

    def _read_buffers(self, model: nn.Module) -> None:
        """Buffers that the checkpoint holds, a router's bias say: small, whole on every rank."""
        persistent = model.state_dict().keys()
        for name, buffer in model.named_buffers():
            if name in persistent and name in self.files.entries:
                whole = self.files.read(name, tuple(buffer.shape), 0, buffer.numel())
                buffer.copy_(whole.view(buffer.shape))

    def _linear(self, name: str, linear: nn.Linear, *, quantize: bool) -> FrozenLinear:
        bias = None if linear.bias is None else self._parameter(f"{name}.bias", linear.bias)
        if quantize:
            layout = nf4.Layout(
                shape=(linear.out_features, linear.in_features), double_quant=self.double_quant
            )
            packed, scales = self._quantized(f"{name}.weight", layout)
            return QuantLinear(layout, packed, scales, bias)
        weight = self._parameter(f"{name}.weight", linear.weight)
        if self.quantize:
            self.report.unquantized[name] = linear.weight.numel() * self.builder.dtype.itemsize
        return FrozenLinear(linear.in_features, linear.out_features, weight, bias)

    def _own_parameters(self, name: str, module: nn.Module, *, trainable: bool) -> None:
        """The parameters that are this module's own, not its children's."""
        for leaf, parameter in list(module.named_parameters(recurse=False)):
            full = f"{name}.{leaf}" if name else leaf
            setattr(module, leaf, self._parameter(full, parameter, trainable=trainable))
            # Weights that are no plain linear's (experts in one 3-D tensor, say) stay as they are.
            if self.quantize and parameter.dim() > 1 and not trainable:
                if not isinstance(module, nn.Embedding):
                    self.report.unquantized[full] = parameter.numel() * self.builder.dtype.itemsize

    def _parameter(self, name: str, meta: Tensor, *, trainable: bool = False) -> nn.Parameter:
        if id(meta) not in self._made:
            made = self._read_parameter(name, tuple(meta.shape), trainable)
            self._made[id(meta)] = (meta, made)
        return self._made[id(meta)][1]

    def _read_parameter(self, name: str, shape: tuple[int, ...], trainable: bool) -> nn.Parameter:
        def values(start: int, stop: int) -> Tensor:
            if name in self.initial:
                return self.initial[name](start, stop)
            own = self.files.read(name, shape, start, stop)
            self.report.other_bytes_read += own.nbytes
            return own.to(self.builder.device, self.builder.dtype)

        return self.builder.parameter(shape, values, trainable=trainable)

    def _quantized(self, name: str, layout: nf4.Layout) -> QuantLinearParameters:
        def read(start: int, stop: int) -> Tensor:
            own = self.files.read(name, layout.shape, start, stop)
            self.report.linear_bytes_read += own.nbytes
            return own.to(self.builder.device)

        itemsize = self.files.entry(name, layout.shape).itemsize
        self.report.linear_bytes_in_file += layout.numel * itemsize
        return quantized_parameters(read, layout, self.builder)


def is_plain_linear(module: nn.Module) -> bool:
    """nn.Linear itself: a subclass may compute something else with its weight."""
    return type(module) is nn.Linear


def _replace(model: nn.Module, name: str, new: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, new)
