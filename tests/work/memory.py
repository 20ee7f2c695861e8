"""What workers run for ``test_memory.py``: the measurement of ``benchmarks/base_alive.py``."""

from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from benchmarks import base_alive
from sparse_lora_dist.adapter.linear import AdapterLinear
from sparse_lora_dist.base_model.frozen_linear import FrozenLinear
from sparse_lora_dist.optim.sparse_adamw import SparseAdamW
from sparse_lora_dist.zero3.engine import Engine
from tests.work.base import config_of, engine_config_of, load_model


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


def left_after_closing(folder: str) -> tuple[int, int]:
    """Tensors of a whole base that an engine used, and how many of them live on after its end."""
    config = config_of(model=folder, precision="fp32")
    zero = {"stage3_param_persistence_threshold": 10**12}
    model = load_model(config, **zero)
    optimizer = SparseAdamW(model.trainable(), lr=0.0, weight_decay=0.0)
    engine = Engine(model.module, optimizer, engine_config_of(config, **zero))
    with engine.evaluating():
        engine(input_ids=torch.zeros(1, 4, dtype=torch.int64), use_cache=False)
    storages = [StorageWeakRef(tensor.untyped_storage()) for tensor in engine._whole]
    engine.close()
    return len(storages), sum(not storage.expired() for storage in storages)
