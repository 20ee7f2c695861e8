"""Create ZeRO-3 parameters directly as shards, so that no rank ever holds a whole parameter.

DeepSpeed's own ``zero.Init`` broadcasts each whole parameter and then cuts it into shards. Here
each rank computes or reads the values of its own shard.
"""

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
from sparse_lora_dist.zero3.slices import Values, as_shard, own_range, shard_of

# DeepSpeed would compile a shared-memory all-reduce for CPU when its process group starts. That
# takes about a minute, and a build that is killed leaves a lock on which later runs hang. ZeRO-3
# never calls it. (On a GPU nothing asks for it, and looking here would probe the ops of all kinds,
# with warnings on every rank.)
if not comm.on_gpu():
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

ZeroParameter = Any
"""A parameter with the ``ds_`` attributes that DeepSpeed adds, which type checkers do not know."""


class _InitWithoutBroadcast(deepspeed.zero.Init):  # type: ignore[misc]
    """zero.Init that fills each rank's shard directly and broadcasts no whole parameter."""

    def __init__(self, engine_config: Mapping[str, Any]) -> None:
        # Do not pass dtype=: without fp16 in hardware DeepSpeed replaces a given fp16 by bf16, and
        # its swap buffers would then convert packed bytes as if they were numbers.
        super().__init__(config_dict_or_path=dict(engine_config))
        self._disk = None
        if self.param_swapper is not None:
            whole_up_to = engine_config["zero_optimization"].get(
                "stage3_param_persistence_threshold", self.param_persistence_threshold
            )
            self._disk = Disk(self.param_swapper, whole_up_to=whole_up_to)

    def fill(self, parameter: ZeroParameter, values: Values) -> None:
        """Convert a new parameter to a ZeRO-3 parameter, of which this rank holds its shard.

        Args:
            parameter: parameter of the whole shape, for which no memory needs to be allocated.
            values: function of (start, stop) that returns these elements, flattened.
        """
        self._convert_to_deepspeed_param(parameter)
        share = shard_of(parameter.ds_numel)
        assert share * comm.world_size() == self._aligned_size(parameter)
        assert self._partition_rank(parameter) == comm.rank()
        start, stop = own_range(parameter.ds_numel)
        own = as_shard(values(start, stop), share, parameter.dtype, self.local_device)
        return_gaps()
        self._adopt(parameter, own, share)

    def refill(self, parameter: ZeroParameter, values: Values) -> None:
        """Replace this rank's shard of a parameter, as ``ShardBuilder.refill`` describes."""
        if parameter.ds_status == ZeroParamStatus.AVAILABLE:  # a persistent parameter
            parameter.partition([parameter])
        own = as_shard(
            values(*own_range(parameter.ds_numel)),
            parameter.ds_tensor.ds_numel,
            parameter.dtype,
            self.local_device,
        )
        parameter.ds_secondary_tensor = None
        self._adopt(parameter, own, parameter.ds_tensor.ds_numel)

    def _adopt(self, parameter: ZeroParameter, own: ZeroParameter, share: int) -> None:
        """Make a tensor this rank's shard of a parameter.

        This repeats what DeepSpeed's ``_partition_param`` does after it has cut a shard. The
        secondary copy of the shard (hpZ) is not made here: DeepSpeed makes it in the first gather.
        A copy made now would keep its values when the parameter is refilled.

        Args:
            parameter: the parameter, already converted by DeepSpeed.
            own: the shard, 1-D with padding.
            share: number of elements of the shard, padding included.
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

    def _partition_param_sec(self, param: ZeroParameter, *args: Any, **options: Any) -> None:
        """Make the secondary copy of a shard (hpZ) of frozen parameters only. After each step,
        DeepSpeed would make those of trained ones anew, and wait for the GPU for each. They are
        small, and are gathered from all ranks."""
        if not param.requires_grad:
            super()._partition_param_sec(param, *args, **options)

    def _ensure_availability_of_partitioned_params(self, params: list[ZeroParameter]) -> None:
        if self._disk is not None:
            self._disk.read(params)


class ShardBuilder:
    """Creates ZeRO-3 parameters; each rank allocates only its own shard of a parameter.

    Use one builder for the whole model: DeepSpeed makes process groups and swap buffers for every
    ``zero.Init``. Creating a builder is collective.

    Args:
        engine_config: the DeepSpeed configuration, as a dict of its JSON form.
        dtype: dtype of all parameters. It must be the one that ``engine_config`` sets.

    Attributes:
        dtype: dtype of all parameters.
        device: device on which shards are created.
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
        """Create a sharded parameter. All ranks must create the same parameters in the same order.

        Args:
            shape: shape of the whole parameter.
            values: function of (start, stop) that returns these elements of the flattened
                parameter, as a 1-D tensor. It is called once, with the range of this rank's shard.
            trainable: True if the parameter gets gradients.
            in_memory: True to keep the shard in memory even if others are offloaded to NVMe. Only
                such a parameter may be refilled (see ``refill``).

        Returns:
            The partitioned parameter. Its ``data`` is empty until ZeRO-3 gathers it.
        """
        nothing = torch.empty(1, dtype=self.dtype, device=self.device).expand(shape)
        parameter: ZeroParameter = nn.Parameter(nothing, requires_grad=trainable)
        parameter.stays_in_memory = in_memory
        self._init.fill(parameter, values)
        return cast(nn.Parameter, parameter)

    def refill(self, parameter: nn.Parameter, values: Values) -> None:
        """Replace the values of a frozen parameter. Call it on all ranks.

        It is collective if ZeRO++'s hpZ is on.

        Args:
            parameter: parameter created with ``in_memory=True``. Its shard, on the CPU or the GPU,
                is replaced.
            values: function of (start, stop) that returns the new values of these elements of the
                flattened parameter, as a 1-D tensor. It is called once, with the range of this
                rank's shard.
        """
        self._init.refill(parameter, values)


def is_of_base(parameter: nn.Parameter) -> bool:
    """Return True for a tensor of the frozen base, which never changes: neither trained nor kept by
    an adapter, for which a method may write it anew."""
    return not (parameter.requires_grad or getattr(parameter, "stays_in_memory", False))


def gathers_too(module: nn.Module, parameters: Iterable[nn.Parameter]) -> None:
    """Make ZeRO-3 gather parameters of other modules whenever ``module`` runs, also in backward.

    Without it ZeRO-3 gathers only the module's own parameters. Call it on all ranks, before the
    first forward.

    Args:
        module: module whose forward reads the parameters.
        parameters: sharded parameters that belong to other modules.
    """
    for parameter in parameters:
        deepspeed.zero.register_external_parameter(module, parameter)


def own_share(parameter: nn.Parameter) -> Tensor:
    """Return a 1-D view of this rank's shard of a parameter, without padding. Not collective.

    Args:
        parameter: sharded parameter. Its shard must be in memory, not on NVMe.
    """
    start, stop = own_range(cast(ZeroParameter, parameter).ds_numel)
    return cast(Tensor, cast(ZeroParameter, parameter).ds_tensor.data[: stop - start])


@contextmanager
def gathered(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Context manager that gathers whole parameters on every rank, only to be read. Collective.

    It uses a single all-gather, where ``deepspeed.zero.GatheredParameters`` uses one for each
    parameter.

    Args:
        parameters: sharded parameters, in the same order on all ranks. Inside the context their
            ``data`` has the whole shape and the engine's dtype. Those that are whole already
            (``zero3.whole``) are left alone.
    """
    found: list[ZeroParameter] = [p for p in parameters if hasattr(p, "ds_status")]
    absent = [p for p in found if p.ds_status == ZeroParamStatus.NOT_AVAILABLE]
    # With hpZ a secondary copy is sharded over fewer ranks than the primary one.
    for has_secondary in (False, True):
        if some := [p for p in absent if (p.ds_secondary_tensor is not None) == has_secondary]:
            some[0].all_gather_coalesced(some).wait()
    try:
        yield
    finally:
        if absent:
            absent[0].partition(absent)
