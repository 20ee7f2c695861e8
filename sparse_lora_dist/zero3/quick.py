"""Take out of DeepSpeed's step what costs the host time and does nothing for training.

DeepSpeed 0.19 asks for its rank to print nothing, marks each of its functions for NVIDIA's
profiler, and walks over all modules of a layer whenever it needs the layer's parameters. Importing
this file replaces these functions in DeepSpeed's modules; what they return stays the same.
``benchmarks/host_time.py`` measures the host's time of a step.
"""

from collections.abc import Iterable
from typing import Any

from deepspeed.runtime.zero import (
    parameter_offload,
    partition_parameters,
    partitioned_param_coordinator,
    stage3,
)
from deepspeed.utils import nvtx
from torch import nn


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


nvtx.enable_nvtx = False
for part in (parameter_offload, partition_parameters, partitioned_param_coordinator, stage3):
    for name in ("print_rank_0", "see_memory_usage"):
        if hasattr(part, name):
            setattr(part, name, say_nothing)
    if hasattr(part, "iter_params"):
        part.iter_params = parameters_of
