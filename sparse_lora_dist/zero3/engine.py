"""The DeepSpeed engine as this project uses it."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import deepspeed
import torch
from deepspeed.runtime.chunked_cross_entropy import chunked_cross_entropy
from deepspeed.utils import groups
from torch import Tensor, nn
from torch.optim import Optimizer

from sparse_lora_dist.distributed import comm
from sparse_lora_dist.zero3.parameters import ZeroParameter
from sparse_lora_dist.zero3.shares import TensorSlice


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

    def _slice_of(self, name: str, parameter: ZeroParameter) -> TensorSlice:
        flat, offset, share = self._zero.grad_position[self._zero.get_param_id(parameter)]
        start = min(share * comm.rank(), parameter.ds_numel)
        length = min(share, parameter.ds_numel - start)
        return TensorSlice(
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

    def master(self, tensor_slice: TensorSlice) -> Tensor:
        """The fp32 master of a slice, 1-D, a view."""
        return self.flats()[tensor_slice.flat].data.narrow(
            0, tensor_slice.offset, tensor_slice.length
        )

    def gradient(self, tensor_slice: TensorSlice) -> Tensor:
        """The gradient between the last backward and ``step``: fp32, the global mean, unclipped."""
        grad = deepspeed.utils.safe_get_local_grad(self.trained[tensor_slice.name])
        assert grad is not None and grad.dtype == torch.float32, tensor_slice.name
        # DeepSpeed hands it out on the GPU even where masters are offloaded to the host.
        return cast(
            Tensor, grad.flatten()[: tensor_slice.length].to(self.master(tensor_slice).device)
        )

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
