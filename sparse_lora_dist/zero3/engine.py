"""Wrapper of the DeepSpeed engine, with access to its fp32 master shards and gradients."""

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
    """A model under DeepSpeed ZeRO-3. Creating and calling it is collective.

    Args:
        model: a model whose parameters are sharded (``ShardBuilder``).
        optimizer: None for an engine that only evaluates.
        engine_config: the DeepSpeed configuration.

    Attributes:
        model: the model itself.
        trained: name -> trained parameter.
        slices: this rank's slice of each trained parameter, in the order of ``trained``.
    """

    def __init__(
        self, model: nn.Module, optimizer: Optimizer | None, engine_config: Mapping[str, Any]
    ) -> None:
        self._engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=dict(engine_config), dist_init_required=False
        )
        comm.bound_all_groups()
        self._zero = self._engine.optimizer
        # DeepSpeed would gather persistent parameters with one collective each after every step.
        # With an empty list the module that first uses one gathers it, in one collective with its
        # other tensors, and it stays gathered.
        self._persistent, self._zero.persistent_parameters = self._zero.persistent_parameters, []
        self.trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.slices = [self._slice_of(name, p) for name, p in self.trained.items()]
        self.model = model
        # transformers returns models in eval mode.
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
        """Run forward and return the model's output. Collective."""
        return self._engine(**inputs)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Context manager: eval mode and no gradients. Not collective itself."""
        self._engine.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self._engine.train()

    def close(self) -> None:
        """Free this rank's shards and hpZ's secondary copies. Not collective.

        DeepSpeed's caches keep the modules alive, so dropping the engine would not free them.
        """
        for parameter in cast(Iterable[ZeroParameter], self.model.parameters()):
            parameter.ds_tensor = parameter.ds_secondary_tensor = None
            parameter.data = parameter.data.new_empty(0)
        # The process group of hpZ. The next zero.Init fails if an old one is left.
        groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None

    def backward(self, loss: Tensor) -> None:
        """Run backward, reduce the gradient, and add this rank's shard of it to that of the step's
        earlier micro-batches. Collective.

        Args:
            loss: scalar loss of one micro-batch on this rank.
        """
        self._engine.backward(loss)

    def step(self, *, refuse: bool = False) -> None:
        """Count a micro-batch; after the last one of a step, clip and update. Collective.

        The update steps the fp32 masters and copies them to the low-precision parameters.

        Args:
            refuse: skip the update and discard the gradient.
        """
        if refuse:  # DeepSpeed skips an update whose gradient norm is not finite
            self._zero._get_norm_groups = lambda: [math.inf]
        try:
            self._engine.step()
        finally:
            self._zero.__dict__.pop("_get_norm_groups", None)

    def gradient_is_finite(self) -> Tensor:
        """Return a scalar that is finite if this rank's whole gradient shard is. Not collective.

        To be called before ``step``. Summed over ranks it tells of the whole gradient.

        Returns:
            fp64 scalar on ``comm.device()``; nan or infinity if any gradient entry is.
        """
        if self._zero.offload_optimizer:
            shards = [cast(Tensor, flat.grad) for flat in self.flats()]
        else:
            shards = [g for group in self._zero.averaged_gradients.values() for g in group]
        return torch.stack(torch._foreach_norm(shards)).double().sum().to(comm.device())

    def flats(self) -> list[Tensor]:
        """Return this rank's flat fp32 master buffers, 1-D, one for each sub-group of DeepSpeed.

        A buffer holds the slices of its trained tensors one after another (``TensorSlice.flat``).
        """
        return list(self._zero.fp32_partitioned_groups_flat)

    def master(self, tensor_slice: TensorSlice) -> Tensor:
        """Return the fp32 master values of a slice: a 1-D view of ``tensor_slice.length`` elements.

        After writing to it call ``masters_changed``.
        """
        return self.flats()[tensor_slice.flat].data.narrow(
            0, tensor_slice.offset, tensor_slice.length
        )

    def gradient(self, tensor_slice: TensorSlice) -> Tensor:
        """Return the gradient of a slice between the last backward of a step and ``step``.

        Returns:
            fp32, 1-D, ``tensor_slice.length`` elements: the mean over all micro-batches and ranks,
            before clipping, on the device of the master.
        """
        grad = deepspeed.utils.safe_get_local_grad(self.trained[tensor_slice.name])
        assert grad is not None and grad.dtype == torch.float32, tensor_slice.name
        # DeepSpeed returns it on the GPU even if the masters are offloaded to the host.
        return cast(
            Tensor, grad.flatten()[: tensor_slice.length].to(self.master(tensor_slice).device)
        )

    def gradient_norm(self) -> float:
        """Return the norm of the whole gradient of the last step, before clipping. Not collective;
        the same on every rank."""
        return float(self._engine.get_global_grad_norm() or 0.0)

    def set_learning_rate(self, rate: Callable[[int], float]) -> None:
        """Set the learning rate of the next step.

        Args:
            rate: birth step of an entry -> its learning rate; 0 for entries live from the start.
        """
        for group in self._zero.optimizer.param_groups:
            group["lr"], group["rate"] = rate(0), rate

    def masters_changed(self) -> None:
        """Copy the fp32 masters to the low-precision parameters. Collective.

        To be called after the masters were written from outside the engine. Persistent parameters
        are partitioned first, or training would go on from their old values.
        """
        if self._persistent:
            self._persistent[0].partition(self._persistent)
        for sub_group in range(len(self.flats())):
            self._zero._reassign_or_swap_out_partitioned_parameters(sub_group)
        self._zero.checkpoint_event_epilogue()


def summed_cross_entropy(logits_TV: Tensor, labels_T: Tensor) -> Tensor:
    """Return the sum over tokens of -log p(label), leaving out labels of -100.

    It is computed in chunks, so no fp32 tensor of the size of the logits exists. Not collective.

    Args:
        logits_TV: any float dtype, [tokens, vocabulary].
        labels_T: int64, [tokens].

    Returns:
        fp32 scalar.
    """
    return cast(Tensor, chunked_cross_entropy(logits_TV, labels_T, reduction="sum"))
