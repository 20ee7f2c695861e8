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
from sparse_lora_dist.distributed.console import print_line
from sparse_lora_dist.errors import in_words
from sparse_lora_dist.zero3 import quick  # noqa: F401
from sparse_lora_dist.zero3.layers import gather_by_layer
from sparse_lora_dist.zero3.parameters import ZeroParameter
from sparse_lora_dist.zero3.slices import TensorSlice
from sparse_lora_dist.zero3.whole import keep_whole

_loss_backend = "auto"
"""What computes the loss: auto (Triton on a GPU) or torch. ``check_loss_kernel`` sets it."""


class Engine:
    """A model under DeepSpeed ZeRO-3. Creating and calling it is collective.

    Args:
        model: a model whose parameters are sharded (created by ``ShardBuilder``).
        optimizer: optimizer of the trained parameters, or None for an engine that only evaluates.
        engine_config: the DeepSpeed configuration, as a dict of its JSON form.

    Attributes:
        model: the model passed in, not DeepSpeed's wrapper.
        trained: the trained parameters by name.
        slices: for each trained parameter, in the order of ``trained``, its slice: the range of
            elements that this rank holds, with its position in the flat buffer of fp32 masters.
    """

    def __init__(
        self, model: nn.Module, optimizer: Optimizer | None, engine_config: Mapping[str, Any]
    ) -> None:
        self._whole = keep_whole(model, engine_config)
        gather_by_layer(model, engine_config)
        self._engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=dict(engine_config), dist_init_required=False
        )
        comm.bound_all_groups()
        self._zero = self._engine.optimizer
        # By default DeepSpeed gathers the persistent parameters after every step, with one
        # collective each. If this list is empty, the first module that uses such a parameter
        # gathers it in one collective with the module's other tensors, and it stays gathered.
        self._persistent, self._zero.persistent_parameters = self._zero.persistent_parameters, []
        self.trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.slices = [self._slice_of(name, p) for name, p in self.trained.items()]
        self.model = model
        if optimizer is not None and not self._zero.offload_optimizer:
            self._zero._get_norm_groups = self._gradient_norms
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
        """Run forward on this rank's micro-batch and return the model's output. Collective.

        Args:
            **inputs: keyword arguments of the model's forward.
        """
        return self._engine(**inputs)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Context manager that sets eval mode and disables gradients, and sets train mode on exit.

        Entering it is not collective, but calls of the engine inside are.
        """
        self._engine.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self._engine.train()

    def train(self) -> None:
        """Set train mode, which a program that made samples in between may have left. Not
        collective."""
        if not self._engine.module.training:
            self._engine.train()

    def close(self) -> None:
        """Free this rank's shards and hpZ's secondary copies of them. Not collective.

        Call it when the engine and its model are no longer used, before another is created in the
        same process. DeepSpeed's caches keep the modules alive, so deleting the engine would not
        free the shards. hpZ is ZeRO++'s option to keep a second copy of the shards within a node.
        """
        for parameter in cast(Iterable[ZeroParameter], self.model.parameters()):
            parameter.ds_tensor = parameter.ds_secondary_tensor = None
            parameter.data = parameter.data.new_empty(0)
        for tensor in self._whole:
            vars(tensor).clear()  # views of it
            tensor.data = tensor.new_empty(0)
        # The process group of hpZ. The next zero.Init fails if an old one is left.
        groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None

    def backward(self, loss: Tensor) -> None:
        """Run backward for one micro-batch and accumulate its gradient. Collective.

        The gradient is reduced over the ranks. Each rank adds its shard of the gradient to the sum
        over the step's earlier micro-batches.

        Args:
            loss: scalar loss of the micro-batch on this rank.
        """
        self._engine.backward(loss)

    def step(self, *, refuse: bool = False) -> None:
        """Finish a micro-batch, and update the parameters if it was the step's last. Collective.

        Call it after each ``backward``. The update clips the gradient, steps the fp32 masters, and
        copies them to the low-precision parameters.

        Args:
            refuse: True to skip the update and discard the gradient. It must be the same on all
                ranks.
        """
        norms = self._zero._get_norm_groups
        if refuse:  # DeepSpeed skips an update whose gradient norm is not finite
            self._zero._get_norm_groups = lambda: [math.inf]
        try:
            self._engine.step()
        finally:
            self._zero._get_norm_groups = norms

    def _gradient_norms(self) -> list[Tensor]:
        """Return the L2 norm of each sub-group's whole gradient, -1 if it is not finite, as
        DeepSpeed does with several calls a tensor. Collective."""
        shards = list(self._zero.averaged_gradients.values())
        own = [torch.stack(torch._foreach_norm(group)).square().sum() for group in shards]
        norms = comm.sum_over_ranks(torch.stack(own)).sqrt()
        return list(torch.where(norms.isfinite(), norms, -1.0))

    def gradient_is_finite(self) -> Tensor:
        """Return a scalar that is finite only if all elements of this rank's gradient shards are.

        Call it after the last ``backward`` of a step and before ``step``. The sum of the scalar
        over the ranks is finite only if the whole gradient is. Not collective.

        Returns:
            fp64 scalar on ``comm.device()``: the sum of the norms of the shards. It is nan or
            infinite if any element of the gradient is.
        """
        if self._zero.offload_optimizer:
            shards = [cast(Tensor, flat.grad) for flat in self.flats()]
        else:
            shards = [g for group in self._zero.averaged_gradients.values() for g in group]
        return torch.stack(torch._foreach_norm(shards)).double().sum().to(comm.device())

    def flats(self) -> list[Tensor]:
        """Return this rank's flat buffers of fp32 master values, one for each DeepSpeed sub-group.

        DeepSpeed steps the trained tensors in groups (``sub_group_size``). Each buffer is a 1-D
        tensor that holds this rank's slices of one group's tensors, one after another. A
        ``TensorSlice`` has the index of its buffer (``flat``) and its position there (``offset``).
        """
        return list(self._zero.fp32_partitioned_groups_flat)

    def master(self, tensor_slice: TensorSlice) -> Tensor:
        """Return a 1-D view of the fp32 master values of a slice, without padding. Not collective.

        After writing to the view, call ``masters_changed`` on all ranks.

        Args:
            tensor_slice: one of ``slices``.

        Returns:
            fp32 tensor of ``tensor_slice.length`` elements.
        """
        return self.flats()[tensor_slice.flat].data.narrow(
            0, tensor_slice.offset, tensor_slice.length
        )

    def gradient(self, tensor_slice: TensorSlice) -> Tensor:
        """Return the gradient of a slice. Not collective.

        Call it after the last backward of a step and before ``step``.

        Args:
            tensor_slice: one of ``slices``.

        Returns:
            fp32 1-D tensor of ``tensor_slice.length`` elements on the device of the master: the
            mean over all micro-batches and ranks, before clipping.
        """
        length = tensor_slice.length
        if self._zero.offload_optimizer:  # beside the masters; DeepSpeed would copy it to the GPU
            beside = cast(Tensor, self.flats()[tensor_slice.flat].grad)
            return beside.narrow(0, tensor_slice.offset, length)
        grad = deepspeed.utils.safe_get_local_grad(self.trained[tensor_slice.name])
        assert grad is not None and grad.dtype == torch.float32, tensor_slice.name
        return cast(Tensor, grad.flatten()[:length])

    def gradient_norm(self) -> float:
        """Return the L2 norm of the last step's whole gradient, before clipping. Not collective.

        The value is the same on every rank.
        """
        return float(self._engine.get_global_grad_norm() or 0.0)

    def set_learning_rate(self, rate: Callable[[int], float]) -> None:
        """Set the learning rate of the next step. Not collective; call it on all ranks.

        Some methods begin to train an element of a tensor only later in the run. The birth step of
        an element is the optimizer step after which it is trained. Elements with different birth
        steps may have different learning rates.

        Args:
            rate: function from the birth step of an element to its learning rate. Birth step 0
                stands for elements that are trained from the start.
        """
        for group in self._zero.optimizer.param_groups:
            group["lr"], group["rate"] = rate(0), rate

    def masters_changed(self) -> None:
        """Copy the fp32 masters to the low-precision parameters. Collective.

        Call it after writing to the masters from outside the engine (see ``master``). Parameters
        that DeepSpeed keeps gathered (persistent ones) are partitioned first. Otherwise training
        would go on with their old values.
        """
        if self._persistent:
            self._persistent[0].partition(self._persistent)
        for sub_group in range(len(self.flats())):
            self._zero._reassign_or_swap_out_partitioned_parameters(sub_group)
        self._zero.checkpoint_event_epilogue()


def summed_cross_entropy(logits_TV: Tensor, labels_T: Tensor) -> Tensor:
    """Return the sum of -log p(label) over all tokens whose label is not -100. Not collective.

    It is computed in chunks, so that no fp32 tensor as large as the logits is allocated.

    Args:
        logits_TV: logits of any float dtype, shape [tokens, vocabulary].
        labels_T: int64 labels, shape [tokens].

    Returns:
        fp32 scalar.
    """
    found = chunked_cross_entropy(logits_TV, labels_T, reduction="sum", backend=_loss_backend)
    return cast(Tensor, found)


def check_loss_kernel() -> None:
    """Let ranks on a GPU that cannot run DeepSpeed's Triton kernel of the loss compute it with
    PyTorch, and say so. Collective, and called before anything is loaded.

    Triton compiles on every machine, with a C compiler and Python's headers.
    """
    global _loss_backend
    if not comm.on_gpu():
        return
    reason = _why_no_triton()
    if reason is not None:
        _loss_backend = "torch"
    for said in dict.fromkeys(filter(None, comm.gather_objects(reason))):
        print_line(
            "note",
            f"the loss is computed with PyTorch, which takes longer, as Triton cannot run: {said}. "
            "It needs a C compiler (gcc, or CC) and Python's headers (python3-dev).",
        )


def _why_no_triton() -> str | None:
    logits_TV = torch.zeros(3, 8, device=comm.device(), dtype=torch.bfloat16, requires_grad=True)
    try:
        summed_cross_entropy(logits_TV, torch.zeros(3, device=comm.device()).long()).backward()
    except Exception as error:  # whatever a compiler or its absence raises
        return in_words(error)
    return None
