"""Everything that touches DeepSpeed: sharded parameters, the engine, where its shards lie.

Private attributes of DeepSpeed are read here and nowhere else; ``tests/test_zero3_contract.py``
pins each.
"""

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
import deepspeed.ops
from deepspeed.git_version_info import installed_ops as installed_ops
from deepspeed.ops.op_builder import AsyncIOBuilder as AsyncIOBuilder
from deepspeed.ops.op_builder.pin_memory import PinMemoryBuilder as PinMemoryBuilder
from deepspeed.runtime.chunked_cross_entropy import chunked_cross_entropy
from deepspeed.runtime.zero.partition_parameters import PartitionedParamStatus, ZeroParamStatus
from deepspeed.utils import groups

from sparse_lora_dist.distributed import comm
from sparse_lora_dist.system.heap import return_gaps
from sparse_lora_dist.zero3.disk import Disk
from sparse_lora_dist.zero3.shares import Slice, Values, as_share, own_range, share_of

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


class Engine:
    """The DeepSpeed engine as this project uses it. Without an optimizer it only evaluates."""

    def __init__(
        self, model: nn.Module, optimizer: Optimizer | None, engine_config: Mapping[str, Any]
    ) -> None:
        self._engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=dict(engine_config), dist_init_required=False
        )
        comm.bound_all_groups()
        self._zero = self._engine.optimizer
        # DeepSpeed would gather these one collective each after every step. Left to the module that
        # uses one first, they come in the same collective as its other tensors, and stay.
        self._persistent, self._zero.persistent_parameters = self._zero.persistent_parameters, []
        self.trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.slices = [self._slice_of(name, p) for name, p in self.trained.items()]
        self.model = model
        # transformers hands models out in eval mode.
        self._engine.train()

    def _slice_of(self, name: str, parameter: ZeroParameter) -> Slice:
        flat, offset, share = self._zero.grad_position[self._zero.get_param_id(parameter)]
        start = min(share * comm.rank(), parameter.ds_numel)
        length = min(share, parameter.ds_numel - start)
        return Slice(
            name=name,
            shape=tuple(parameter.ds_shape),
            start=start,
            length=length,
            flat=flat,
            offset=offset,
            share=share,
        )

    def __call__(self, **inputs: Tensor | bool) -> Any:
        """The model's output. Collective, like everything that runs the model."""
        return self._engine(**inputs)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """No gradients and no dropout inside."""
        self._engine.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self._engine.train()

    def close(self) -> None:
        """Free this rank's shares, and hpZ's. Modules stay alive in caches of DeepSpeed's."""
        for parameter in cast(Iterable[ZeroParameter], self.model.parameters()):
            parameter.ds_tensor = parameter.ds_secondary_tensor = None
            parameter.data = parameter.data.new_empty(0)
        # hpZ's group, which the next zero.Init makes anew or refuses to.
        groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None

    def backward(self, loss: Tensor) -> None:
        """Reduce a micro-batch's gradient, and add this rank's shard of it. Collective."""
        self._engine.backward(loss)

    def step(self, *, refuse: bool = False) -> None:
        """Count a micro-batch; the last one clips, steps, refreshes the live copy. Collective.

        With ``refuse`` nothing changes but that the gradient is gone.
        """
        if refuse:  # what DeepSpeed does with a norm that is not finite, whatever the norm is
            self._zero._get_norm_groups = lambda: [math.inf]
        try:
            self._engine.step()
        finally:
            self._zero.__dict__.pop("_get_norm_groups", None)

    def gradient_is_finite(self) -> Tensor:
        """Before ``step``: a number that is finite where all of this rank's gradient is."""
        if self._zero.offload_optimizer:
            shards = [cast(Tensor, flat.grad) for flat in self.flats()]
        else:
            shards = [g for group in self._zero.averaged_gradients.values() for g in group]
        return torch.stack(torch._foreach_norm(shards)).double().sum().to(comm.device())

    def flats(self) -> list[Tensor]:
        """The fp32 master shards, 1-D, one per sub-group: trained tensors one after another."""
        return list(self._zero.fp32_partitioned_groups_flat)

    def master(self, piece: Slice) -> Tensor:
        """The fp32 master of a slice, 1-D, a view."""
        return self.flats()[piece.flat].data.narrow(0, piece.offset, piece.length)

    def gradient(self, piece: Slice) -> Tensor:
        """The gradient between the last backward and ``step``: fp32, the global mean, unclipped."""
        grad = deepspeed.utils.safe_get_local_grad(self.trained[piece.name])
        assert grad is not None and grad.dtype == torch.float32, piece.name
        # DeepSpeed hands it out on the GPU even where masters are offloaded to the host.
        return cast(Tensor, grad.flatten()[: piece.length].to(self.master(piece).device))

    def gradient_norm(self) -> float:
        """Norm of the whole gradient of the last step, before clipping."""
        return float(self._engine.get_global_grad_norm() or 0.0)

    def set_learning_rate(self, rate: Callable[[int], float]) -> None:
        """For the next step: that of entries that came to life after so many steps; 0: at first."""
        for group in self._zero.optimizer.param_groups:
            group["lr"], group["rate"] = rate(0), rate

    def masters_changed(self) -> None:
        """Bring the engine's low-precision copy in line after the masters were written from
        outside. Collective.

        Persistent parameters go back to their shares first, or training goes on from stale values.
        """
        if self._persistent:
            self._persistent[0].partition(self._persistent)
        for sub_group in range(len(self.flats())):
            self._zero._reassign_or_swap_out_partitioned_parameters(sub_group)
        self._zero.checkpoint_event_epilogue()


def summed_cross_entropy(logits_TV: Tensor, labels_T: Tensor) -> Tensor:
    """Sum of -log p(label) where it is not -100, fp32, without an fp32 tensor of logits' size."""
    return cast(Tensor, chunked_cross_entropy(logits_TV, labels_T, reduction="sum"))
