"""Take out of DeepSpeed's step what costs the host time and does nothing for training.

DeepSpeed 0.19 asks for its rank to print nothing, marks each of its functions for NVIDIA's
profiler, and walks over all modules of a layer whenever it needs the layer's parameters. Importing
this file replaces these functions in DeepSpeed's modules; what they return stays the same.
``benchmarks/host_time.py`` measures the host's time of a step.
"""

from collections.abc import Iterable
from functools import cache
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero import (
    parameter_offload,
    partition_parameters,
    partitioned_param_coordinator,
    stage3,
)
from deepspeed.runtime.zero.offload_config import OffloadDeviceEnum
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.utils import nvtx
from deepspeed.utils.groups import _get_zero_param_intra_parallel_group as has_second_shards
from torch import Tensor, nn

AVAILABLE = "_PartitionedParameterCoordinator__n_available_params"
"""DeepSpeed's number of elements that are gathered."""


def say_nothing(message: str, *, force: bool = False, **others: Any) -> None:
    """Take the place of DeepSpeed's ``print_rank_0`` and ``see_memory_usage``, which print only if
    a line of its own source says ``force=True``."""


def parameters_of(module: Any, recurse: bool = False) -> Iterable[nn.Parameter]:
    """Return what DeepSpeed's ``iter_params`` returns: a module's parameters and those that it
    reads of others. They are remembered, as they stay the same once DeepSpeed has its hooks.

    Args:
        module: a module.
        recurse: True: also the parameters of the modules in it.
    """
    key = recurse, len(module._external_params)
    known: dict[Any, list[nn.Parameter]] = module.__dict__.setdefault("_known_parameters", {})
    if key not in known:
        own = [parameter for _, parameter in module.named_parameters(recurse=recurse)]
        known[key] = own + [parameter for _, parameter in module.ds_external_parameters()]
    return known[key]


def release(coordinator: Any, parameter: Any, free_data: bool = True) -> None:
    """Do what the coordinator's ``__release_param`` does: forget a gathered parameter that no
    module uses. A shard that lies in memory stays as it is, so nothing is cut or copied.

    Args:
        coordinator: DeepSpeed's ``PartitionedParameterCoordinator``.
        parameter: the parameter.
        free_data: False if the caller frees its memory.
    """
    if parameter.ds_status != ZeroParamStatus.AVAILABLE or parameter.ds_active_sub_modules:
        return
    is_plain = free_data and not has_second_shards() and parameter.ds_tensor is not None
    if is_plain and parameter.ds_tensor.final_location != OffloadDeviceEnum.nvme:
        accelerator, data = get_accelerator(), parameter.data
        if not accelerator.is_synchronized_device() and accelerator.on_accelerator(data):
            data.record_stream(accelerator.current_stream())  # it may still compute
        parameter.data = _nothing(data.dtype, data.device)
        parameter.ds_status = ZeroParamStatus.NOT_AVAILABLE
    else:
        parameter.partition(free_data=free_data)
    coordinator.__dict__[AVAILABLE] -= parameter.ds_numel


@cache
def _nothing(dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty(0, dtype=dtype, device=device)


nvtx.enable_nvtx = False
Coordinator = partitioned_param_coordinator.PartitionedParameterCoordinator
Coordinator._PartitionedParameterCoordinator__release_param = release
for part in (parameter_offload, partition_parameters, partitioned_param_coordinator, stage3):
    for name in ("print_rank_0", "see_memory_usage"):
        if hasattr(part, name):
            setattr(part, name, say_nothing)
    if hasattr(part, "iter_params"):
        part.iter_params = parameters_of
