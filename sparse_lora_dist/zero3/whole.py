"""Take frozen tensors that every rank holds whole out of ZeRO-3's hands.

DeepSpeed keeps parameters of at most ``stage3_param_persistence_threshold`` elements gathered from
one use to the next, but it partitions them after every step, gathers them again in the next one,
and counts them in every hook. A frozen tensor never changes, so here it is gathered once, before
DeepSpeed sees the model, and is a buffer of its module from then on. With a threshold above the
largest tensor that is the whole base: a step then gathers nothing but adapters. A single rank has
all shards anyway, so there it is the whole base whatever the threshold is, in the same memory.
"""

import sys
from collections.abc import Iterable, Mapping
from typing import Any, cast

from torch import Tensor, nn

from sparse_lora_dist.distributed import comm
from sparse_lora_dist.zero3.parameters import ZeroParameter, gathered, is_of_base

AT_ONCE = 64
"""Number of tensors that are gathered together. While they are, a copy of them exists."""


def keep_whole(model: nn.Module, engine_config: Mapping[str, Any]) -> list[Tensor]:
    """Make buffers of the frozen parameters that stay whole, in place. Collective.

    Args:
        model: a model whose parameters are sharded, before ``deepspeed.initialize``.
        engine_config: the DeepSpeed configuration, as a dict of its JSON form.

    Returns:
        The tensors that are whole now.
    """
    whole = _staying(model, engine_config["zero_optimization"])
    for start in range(0, len(whole), AT_ONCE):
        some = whole[start : start + AT_ONCE]
        with gathered(some):
            tensors = [parameter.data for parameter in some]
        for parameter, tensor in zip(some, tensors, strict=True):
            for name in list(vars(parameter)):  # what makes it a parameter of ZeRO-3
                delattr(parameter, name)
            parameter.data = tensor
    ids = {id(parameter) for parameter in whole}
    for module in model.modules():
        _let_go(module, ids)
    return whole


def offloads_parameters(zero: Mapping[str, Any]) -> bool:
    """Return True if the parameters lie in host memory or on NVMe.

    Args:
        zero: section "zero_optimization" of the DeepSpeed configuration.
    """
    offload: Mapping[str, Any] = zero.get("offload_param") or {}
    return bool(offload.get("device", "none") != "none")


def _let_go(module: nn.Module, whole: set[int]) -> None:
    for name, parameter in list(module._parameters.items()):
        if id(parameter) in whole:
            del module._parameters[name]
            module.register_buffer(name, parameter, persistent=False)
    external: dict[int, nn.Parameter] = getattr(module, "_external_params", {})
    for key in external.keys() & whole:
        del external[key]


def _staying(model: nn.Module, zero: Mapping[str, Any]) -> list[ZeroParameter]:
    """Return the frozen parameters that DeepSpeed would keep gathered, by its own rule, or all on a
    single rank that keeps them on its device. DeepSpeed needs a parameter to begin with, so of a
    model without any other the last is left to it."""
    largest = zero.get("stage3_param_persistence_threshold", 100_000)
    room = zero.get("stage3_model_persistence_threshold", sys.maxsize)
    if comm.world_size() == 1 and not offloads_parameters(zero):
        largest = room = sys.maxsize
    parameters = list(cast(Iterable[ZeroParameter], model.parameters()))
    staying = []
    for parameter in parameters:
        if parameter.ds_numel <= min(largest, room):
            room -= parameter.ds_numel
            staying.append(parameter)
    return [p for p in staying if is_of_base(p)][: len(parameters) - 1]
