"""Compute the loss inside the output head, with the logits of a few tokens at a time.

A token has as many logits as the vocabulary has entries. For 4,096 tokens of Llama 3, logits take
1.05 GB in bf16, and their gradient as much again. Here, while ZeRO-3 has the head's weight
gathered for forward, the head turns hidden states into the loss, a chunk of tokens at a time. In
the same call it computes the gradient of the loss with respect to the hidden states. So backward
needs no logits and, if the head is frozen, not the head's weight either. Target tokens are those
that have a loss; other tokens never enter the head.

Shapes: M rows of a micro-batch, T tokens of a row, N target tokens of a micro-batch, I width of the
hidden states, V vocabulary.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from sparse_lora_dist.base_model.frozen_linear import FrozenLinear
from sparse_lora_dist.data import NOT_A_TARGET
from sparse_lora_dist.distributed import comm
from sparse_lora_dist.distributed.console import megabytes, print_line
from sparse_lora_dist.distributed.device import moved
from sparse_lora_dist.tasks.logit_ops import Operation, OperationRecorder
from sparse_lora_dist.zero3.engine import Engine, summed_cross_entropy

CHUNK_BYTES = 2**26
"""Bytes of the fp32 logits of one chunk of tokens. About three such tensors are in memory at a
time."""


class LossHead(nn.Module):
    """Output head that returns logits or, inside the context ``expecting``, computes the loss.

    It takes the place of the head's linear in the model and has its parameters under the same
    names. Its forward is collective, since ZeRO-3 gathers the weight.

    Args:
        linear: the model's output head.
    """

    def __init__(self, linear: FrozenLinear | nn.Linear) -> None:
        super().__init__()
        self._linear = (linear,)  # in a tuple: as a submodule it would change parameter names
        for name, parameter in linear._parameters.items():
            self.register_parameter(name, parameter)
        self.vocabulary = linear.out_features
        self.after: list[Operation] | None = None
        """Operations that the model applies to the logits after the head, such as soft-capping;
        None until they are recorded in the first forward."""
        self.refused: str | None = None
        """Name of an operation that the model applies to the logits of all tokens at once, so that
        they cannot be computed in chunks. None if there is none."""
        self.told = False
        """True once a note about ``refused`` was printed."""
        self.targets: tuple[Tensor, ...] | None = None
        """(positions of the target tokens in the flattened micro-batch, tokens that they should
        predict), both int64 [N] on the device, filled up by ``_filled_up``. None outside
        ``expecting``."""
        self.one_by_one = False
        """True: compute the loss of each target token. False: compute the sum of their losses."""
        self.num_targets = 0
        """Number of ``targets`` that are none of those they are filled up with."""
        self._loss: Tensor | None = None

    def trained(self) -> dict[str, nn.Parameter]:
        """Return name -> parameter of the head's parameters that train; empty if it is frozen."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def forward(self, x_MTI: Tensor) -> Tensor:
        """Return the logits. Inside the context ``expecting(targets)``, keep the loss on these
        targets and return empty logits.

        Collective.

        Args:
            x_MTI: hidden states.

        Returns:
            Logits [M rows, T tokens, V vocabulary], or [M, T, 0] inside ``expecting``.
        """
        if self.targets is None:
            return cast(Tensor, self._linear[0](x_MTI))
        if self.one_by_one:
            chunks = self.chunks(self.at_targets(x_MTI))
            losses = torch.cat([each_loss(self.logits(x, {}), labels) for x, labels in chunks])
            self._loss = losses[: self.num_targets]
            return x_MTI.new_empty(*x_MTI.shape[:-1], 0)
        trained = self.trained().values()
        logits_MT0: Tensor
        self._loss, logits_MT0 = _SummedLoss.apply(  # type: ignore[no-untyped-call]
            x_MTI, self, torch.is_grad_enabled(), *trained
        )
        # ZeRO-3 gathers a module again for backward if its output takes part in it. A frozen head
        # is not needed there. A trained head is: DeepSpeed attaches the gradient to its weight.
        return logits_MT0 if trained else logits_MT0.detach()

    def logits(self, x_NI: Tensor, leaves: dict[str, Tensor]) -> Tensor:
        """Return the logits that the model would return for a few hidden states.

        ZeRO-3 must have gathered the head's weight.

        Args:
            x_NI: hidden states of some tokens.
            leaves: name of a parameter of the head -> tensor to use in its place. A parameter that
                has no item here is not replaced.

        Returns:
            [N, V], after the operations that the model applies to logits.
        """
        y_NV: Tensor = functional_call(self._linear[0], leaves, (x_NI,))
        for operation in self.after or []:
            y_NV = operation(y_NV)
        return y_NV

    def at_targets(self, x_MTI: Tensor) -> Tensor:
        """Return the hidden states of the target tokens, [N, I], out of those of all tokens."""
        assert self.targets is not None
        return x_MTI.flatten(0, -2).index_select(0, self.targets[0])

    def chunks(self, x_NI: Tensor) -> Iterable[tuple[Tensor, Tensor]]:
        """Split the target tokens into chunks whose logits fit in ``CHUNK_BYTES`` as fp32.

        Args:
            x_NI: hidden states of the target tokens.

        Returns:
            Iterable of (hidden states, labels), one pair for each chunk. A chunk has one token if
            not even the logits of one fit.
        """
        assert self.targets is not None
        rows = self.tokens_of_a_chunk
        return zip(x_NI.split(rows), self.targets[1].split(rows), strict=True)

    @property
    def tokens_of_a_chunk(self) -> int:
        """Number of tokens whose logits fit in ``CHUNK_BYTES`` as fp32, at least 1."""
        return max(1, CHUNK_BYTES // (4 * self.vocabulary))

    @contextmanager
    def expecting(self, labels_MT: Tensor, *, one_by_one: bool = False) -> Iterator[None]:
        """Context manager in which the model returns its loss as ``loss``, and empty logits.

        Args:
            labels_MT: the token that each position's logits should predict, int64, on the CPU;
                ``NOT_A_TARGET`` where there is none.
            one_by_one: True: ``loss`` has the loss of each target token, [N], without gradient.
                False: it is their sum.
        """
        self.one_by_one = one_by_one
        labels_T = labels_MT.flatten()
        # nonzero on the host, where the labels are: on a GPU it would wait for the stream.
        where_N = (labels_T != NOT_A_TARGET).nonzero().squeeze(1)
        self.num_targets = len(where_N)
        more = _filled_up(self.num_targets, self.tokens_of_a_chunk) - self.num_targets
        labels_N = F.pad(labels_T[where_N], (0, more), value=NOT_A_TARGET)
        self.targets = moved(comm.device(), F.pad(where_N, (0, more)), labels_N)
        try:
            yield
        finally:
            self.targets = self._loss = None
            self.one_by_one = False

    def put_loss(self, output: Any) -> None:
        """Set ``output.loss`` to the loss that forward stored, if inside ``expecting``.

        A forward hook of the model calls it. DeepSpeed's backward has to start from a tensor of the
        model's output, so the loss must be part of it.

        Args:
            output: the model's output, changed in place.
        """
        if self.targets is not None:
            assert self._loss is not None, "the model did not run its output head"
            # The sum of no entries is 0, but it connects backward with a trained head's output.
            output["loss"] = self._loss + output.logits.sum()


class _SummedLoss(torch.autograd.Function):
    """Autograd function that returns the sum of -log p(label) over the target tokens.

    Forward computes the loss and, chunk by chunk, its gradients with respect to the hidden states
    and the head's trained parameters. Backward multiplies them by the gradient that it is given for
    the loss.
    """

    @staticmethod
    def forward(
        ctx: Any, x_MTI: Tensor, head: LossHead, with_gradient: bool, *trained: Tensor
    ) -> tuple[Tensor, Tensor]:
        assert head.targets is not None
        where_N, x_NI = head.targets[0], head.at_targets(x_MTI)
        leaves = {n: p.detach().requires_grad_() for n, p in head.trained().items()}
        sums = [torch.zeros_like(p, dtype=torch.float32) for p in trained if with_gradient]
        total = x_NI.new_zeros((), dtype=torch.float32)
        for x, labels in head.chunks(x_NI):
            with torch.set_grad_enabled(with_gradient):
                leaf = x.detach().requires_grad_()
                loss = summed_cross_entropy(head.logits(leaf, leaves), labels)
            total += loss.detach()
            if with_gradient:
                grad_x, *grads = torch.autograd.grad(loss, [leaf, *leaves.values()])
                x.copy_(grad_x)  # the chunk's hidden states are used up: reuse their memory
                for part, grad in zip(sums, grads, strict=True):
                    part += grad
        ctx.shape, ctx.where_N, ctx.grad_x_NI = x_MTI.shape, where_N, x_NI
        ctx.grads = [part.to(p.dtype) for part, p in zip(sums, trained, strict=False)]
        return total, x_MTI.new_empty(*x_MTI.shape[:-1], 0)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        scale = grad_outputs[0]
        grad_x_TI = ctx.grad_x_NI.new_zeros(ctx.shape).flatten(0, -2)
        # What targets are filled up with points to token 0 with a gradient of 0.
        grad_x_TI.index_add_(0, ctx.where_N, (ctx.grad_x_NI * scale).to(grad_x_TI.dtype))
        grads = [(grad * scale).to(grad.dtype) for grad in ctx.grads]
        return grad_x_TI.view(ctx.shape), None, None, *grads


def _filled_up(count: int, chunk: int) -> int:
    """Return the number of tokens to which the target tokens of a micro-batch are filled up.

    The last chunk gets one of few sizes: 8, 16, 24, 32, then four for each power of two. Each size
    that a matmul has not had yet costs memory that is not given back: oneDNN keeps what it made
    for it, and CUDA's allocator a block.

    Args:
        count: number of target tokens.
        chunk: number of tokens of a whole chunk.
    """
    last = count % chunk
    size = max(8, 1 << max(0, last.bit_length() - 3))
    return count - last + min(chunk, -(-last // size) * size)


def install(model: PreTrainedModel) -> None:
    """Replace the model's output head by a ``LossHead``, if the head is a plain linear.

    If it is another module, a note is printed and the model does not change.

    Args:
        model: loaded model, changed in place.
    """
    head = model.get_output_embeddings()
    name = next((name for name, module in model.named_modules() if module is head), None)
    if name is None:
        return
    if not (isinstance(head, FrozenLinear) or type(head) is nn.Linear):
        print_line(
            "note",
            f"{name} is not a plain linear ({type(head).__name__}), so the logits of all tokens "
            "are computed at once",
        )
        return
    loss_head = LossHead(head)
    model.set_submodule(name, loss_head)
    model.register_forward_hook(lambda module, inputs, output: loss_head.put_loss(output))


def summed_loss(engine: Engine, labels_MT: Tensor, **inputs: Any) -> Tensor:
    """Return the sum of -log p(label) over the target tokens of a micro-batch. Collective.

    Args:
        engine: engine that runs the model.
        labels_MT: the token that each position's logits should predict, int64, on the CPU;
            ``NOT_A_TARGET`` where there is none.
        inputs: the model's inputs, on the device.

    Returns:
        Loss in nats, fp32 scalar on the device.
    """
    if head := _loss_head(engine, inputs):
        with head.expecting(labels_MT):
            return cast(Tensor, engine(**inputs).loss)
    logits_MTV = engine(**inputs).logits
    return summed_cross_entropy(logits_MTV.flatten(0, 1), labels_MT.flatten().to(comm.device()))


def target_losses(engine: Engine, labels_MT: Tensor, **inputs: Any) -> Tensor:
    """Return -log p(label) of each target token of a micro-batch, without gradient. Collective.

    Args:
        engine: engine that runs the model.
        labels_MT: the token that each position's logits should predict, int64, on the CPU;
            ``NOT_A_TARGET`` where there is none.
        inputs: the model's inputs, on the device.

    Returns:
        Losses in nats, fp32, 1-D, on the device: one for each target token, row by row.
    """
    if head := _loss_head(engine, inputs):
        with head.expecting(labels_MT, one_by_one=True):
            return cast(Tensor, engine(**inputs).loss)
    logits_TV, labels_T = engine(**inputs).logits.flatten(0, 1), labels_MT.flatten()
    where_N = labels_T != NOT_A_TARGET
    return each_loss(logits_TV[where_N.to(comm.device())], labels_T[where_N].to(comm.device()))


def each_loss(logits_NV: Tensor, labels_N: Tensor) -> Tensor:
    """Return -log p(label) of each token, in nats, fp32 [N].

    Args:
        logits_NV: logits of the tokens.
        labels_N: index in the vocabulary of the token that each should predict, int64.
    """
    return F.cross_entropy(logits_NV.float(), labels_N, reduction="none")


def logits_of(engine: Engine, inputs: dict[str, Any], *, by_row: bool = False) -> Tensor:
    """Return the logits of all tokens of a few short rows, without gradient. Collective.

    If it is the first forward of the model, it is also used to record which operations the model
    applies to the logits after the head.

    Args:
        engine: engine that runs the model.
        inputs: the model's inputs by name, on the device.
        by_row: True to run one row at a time.
    """
    count = inputs["input_ids"].shape[0]
    parts = [slice(i, i + 1) for i in range(count)] if by_row else [slice(count)]
    here = {k: v.to(comm.device()) if isinstance(v, Tensor) else v for k, v in inputs.items()}
    return torch.cat([_logits(engine, _cut(here, part)) for part in parts])


def _logits(engine: Engine, inputs: dict[str, Any]) -> Tensor:
    head = cast(PreTrainedModel, engine.model).get_output_embeddings()
    if isinstance(head, LossHead) and head.after is None:
        return _record_operations(engine, head, inputs)
    with torch.no_grad():
        return cast(Tensor, engine(**inputs).logits)


def _cut(inputs: dict[str, Any], *part: slice) -> dict[str, Any]:
    return {k: v[part] if isinstance(v, Tensor) else v for k, v in inputs.items()}


def _loss_head(engine: Engine, inputs: dict[str, Any]) -> LossHead | None:
    """Return the model's ``LossHead``; None if the logits of all tokens are needed at once.

    The first call runs a forward, to record which operations the model applies to the logits after
    the head. Collective.

    Args:
        engine: engine that runs the model.
        inputs: the model's inputs by name, on the device.
    """
    head = cast(PreTrainedModel, engine.model).get_output_embeddings()
    if not isinstance(head, LossHead):
        return None
    if head.after is None:
        _record_operations(engine, head, _cut(inputs, slice(None), slice(2)))
    if head.refused is not None and not head.told:
        _tell_refused(engine, head, inputs["input_ids"].numel())
    return head if head.refused is None else None


def _record_operations(engine: Engine, head: LossHead, inputs: dict[str, Any]) -> Tensor:
    """Record the operations that the model applies to the logits after the head. Collective.

    Args:
        engine: engine that runs the model.
        head: output head of the model. Its ``after`` and ``refused`` are set.
        inputs: the model's inputs by name, on the device, of few tokens.

    Returns:
        The logits of these tokens.
    """
    watch = OperationRecorder()
    # Runs after DeepSpeed's own hooks, so it sees the tensor that the model gets.
    handle = head.register_forward_hook(lambda module, args, y: watch.begin(y))
    with torch.no_grad(), watch:
        logits: Tensor = engine(**inputs).logits
    handle.remove()
    watch.end(logits)
    head.after, head.refused = watch.operations, watch.refused
    return logits


def _tell_refused(engine: Engine, head: LossHead, tokens: int) -> None:
    """Print, once, why the logits of all tokens of a micro-batch are computed at once."""
    head.told = True
    dtype = next(engine.model.parameters()).dtype
    size = megabytes(tokens * head.vocabulary * dtype.itemsize)
    print_line("note", f"this architecture applies {head.refused} to its logits, so all of them")
    print_line(
        "", f"are computed at once: {size} a micro-batch, and as much again for their gradient"
    )
