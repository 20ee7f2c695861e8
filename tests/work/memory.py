"""What workers run for ``test_memory.py``: the measurement of ``benchmarks/base_alive.py``."""

from unittest.mock import patch

import torch.nn.functional as F
from torch import Tensor

from benchmarks import base_alive
from sparse_lora_dist.adapter.linear import AdapterLinear
from sparse_lora_dist.base_model.frozen_linear import FrozenLinear


def alive_bytes(folder: str, precision: str = "bf16") -> base_alive.Alive:
    """Of our own forward."""
    return base_alive.ours(folder, precision)


def alive_bytes_of_plain_matmul(folder: str) -> base_alive.Alive:
    """The same where torch's own linear takes the dequantised weight, and keeps it."""

    def linear(layer: FrozenLinear, x_TI: Tensor) -> Tensor:
        return F.linear(x_TI, layer.weight_OI(x_TI.dtype))

    def adapted(layer: AdapterLinear, x_TI: Tensor) -> Tensor:
        y_TO = linear(layer.base, x_TI)
        tensors = {name: getattr(layer, name) for name in layer.specs}
        return y_TO + layer.form.delta(x_TI, tensors, layer.scale)

    with (
        patch.object(FrozenLinear, "forward", linear),
        patch.object(AdapterLinear, "forward", adapted),
    ):
        return base_alive.ours(folder)
