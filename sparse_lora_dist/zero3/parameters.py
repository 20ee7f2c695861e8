"""Sharded parameters: a rank holds its ZeRO-3 shard only, and never more while it is made."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import deepspeed
import deepspeed.ops
import torch
from deepspeed.runtime.zero.partition_parameters import PartitionedParamStatus, ZeroParamStatus
from torch import Tensor, nn

from sparse_lora_dist.distributed import comm
from sparse_lora_dist.system.heap import return_gaps
from sparse_lora_dist.zero3.disk import Disk
from sparse_lora_dist.zero3.shares import Values, as_share, own_range, share_of

# DeepSpeed would compile a shared-memory all-reduce for CPU when its process group starts: about a
# minute, and a build that is killed leaves a lock on which later runs hang. ZeRO-3 never calls it.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

ZeroParameter = Any
"""A tensor with the ``ds_`` attributes that DeepSpeed hangs on it, of which no type knows."""


class _InitWithoutBroadcast(deepspeed.zero.Init):  # type: ignore[misc]
    """zero.Init whose parameters are never whole: nothing is broadcast to be cut up after."""

    def __init__(self, engine_config: Mapping[str, Any]) -> None:
        # Without dtype=: where there is no fp16 in hardware, DeepSpeed makes bf16 of what is given
        # there, and its swap buffers would convert packed bytes as if they were numbers.
        super().__init__(config_dict_or_path=dict(engine_config))
        self._disk = None
        if self.param_swapper is not None:
            whole = engine_config["zero_optimization"].get(
                "stage3_param_persistence_threshold", self.param_persistence_threshold
            )
            self._disk = Disk(self.param_swapper, whole_up_to=whole)

    def fill(self, parameter: ZeroParameter, values: Values) -> None:
        self._convert_to_deepspeed_param(parameter)
        share = share_of(parameter.ds_numel)
        assert share * comm.world_size() == self._aligned_size(parameter)
        assert self._partition_rank(parameter) == comm.rank()
        start, stop = own_range(parameter.ds_numel)
        own = as_share(values(start, stop), share, parameter.dtype, self.local_device)
        return_gaps()
        self._adopt(parameter, own, share)

    def refill(self, parameter: ZeroParameter, values: Values) -> None:
        if parameter.ds_status == ZeroParamStatus.AVAILABLE:  # small ones stay whole
            parameter.partition([parameter])
        own = as_share(
            values(*own_range(parameter.ds_numel)),
            parameter.ds_tensor.ds_numel,
            parameter.dtype,
            self.local_device,
        )
        parameter.ds_secondary_tensor = None
        self._adopt(parameter, own, parameter.ds_tensor.ds_numel)

    def _adopt(self, parameter: ZeroParameter, own: ZeroParameter, share: int) -> None:
        """What ``_partition_param`` does once it has cut a share from the whole.

        Without its secondary copy (hpZ): DeepSpeed makes that from the first gather, when the
        bytes are in place; made now, it would serve what was there before them.
        """
        disk = self._disk if self._disk and self._disk.takes(parameter, share) else None
        if disk:
            own = disk.buffer(parameter, own)
        elif not parameter.ds_persist and self.remote_device != self.local_device:
            own = own.to("cpu" if self.remote_device == "nvme" else self.remote_device)
            own = own.pin_memory() if self.pin_memory and torch.cuda.is_available() else own
        own.requires_grad = False
        parameter.ds_tensor = own
        parameter.ds_tensor.ds_numel = share
        parameter.ds_tensor.status = PartitionedParamStatus.AVAILABLE
        parameter.ds_tensor.final_location = "nvme" if disk else None
        parameter.ds_numel_aligned = self._aligned_size(parameter)
        parameter.data = torch.empty(0, dtype=parameter.dtype, device=self.local_device)
        parameter.ds_status = ZeroParamStatus.NOT_AVAILABLE
        if disk:
            disk.write(parameter)

    def _ensure_availability_of_partitioned_params(self, params: list[ZeroParameter]) -> None:
        if self._disk is not None:
            self._disk.read(params)


class ShardBuilder:
    """Makes parameters of which every rank holds its ZeRO-3 share only, in the engine's dtype.

    One builder serves the whole model: DeepSpeed makes process groups and swappers once per
    zero.Init.
    """

    def __init__(self, engine_config: Mapping[str, Any], dtype: torch.dtype) -> None:
        self._init = _InitWithoutBroadcast(engine_config)
        assert self._init.dtype == dtype, (self._init.dtype, dtype)
        self.dtype = dtype
        self.device = cast(torch.device, self._init.local_device)

    def parameter(
        self,
        shape: tuple[int, ...],
        values: Values,
        *,
        trainable: bool = False,
        in_memory: bool = False,
    ) -> nn.Parameter:
        """A sharded parameter of ``shape``; ``values`` is asked once, for this rank's share.

        Args:
            in_memory: it stays there where others go to NVMe, and may be filled anew.
        """
        nothing = torch.empty(1, dtype=self.dtype, device=self.device).expand(shape)
        parameter: ZeroParameter = nn.Parameter(nothing, requires_grad=trainable)
        parameter.stays_in_memory = in_memory
        self._init.fill(parameter, values)
        return cast(nn.Parameter, parameter)

    def refill(self, parameter: nn.Parameter, values: Values) -> None:
        """Other values for a frozen one, wherever its share lies. Collective under hpZ."""
        self._init.refill(parameter, values)


def gathers_too(module: nn.Module, parameters: Iterable[nn.Parameter]) -> None:
    """These of another module are whole too whenever ``module`` runs, forward and backward."""
    for parameter in parameters:
        deepspeed.zero.register_external_parameter(module, parameter)


def own_share(parameter: nn.Parameter) -> Tensor:
    """This rank's share of a parameter that is in memory, without padding, 1-D, a view."""
    start, stop = own_range(cast(ZeroParameter, parameter).ds_numel)
    return cast(Tensor, cast(ZeroParameter, parameter).ds_tensor.data[: stop - start])


@contextmanager
def gathered(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """The parameters whole, in the engine's dtype, on every rank, for reading. Collective.

    In one exchange; deepspeed.zero.GatheredParameters takes one for each.
    """
    found: list[ZeroParameter] = list(parameters)
    absent = [p for p in found if p.ds_status == ZeroParamStatus.NOT_AVAILABLE]
    # hpZ's secondary copies lie among fewer ranks than primary ones.
    for has_secondary in (False, True):
        if some := [p for p in absent if (p.ds_secondary_tensor is not None) == has_secondary]:
            some[0].all_gather_coalesced(some).wait()
    try:
        yield
    finally:
        if absent:
            absent[0].partition(absent)
