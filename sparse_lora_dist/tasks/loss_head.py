"""The output head under a loss: logits of a few tokens at a time, never of all.

A token's logits are as long as the vocabulary: 4,096 tokens of Llama 3 make 1.05 GB of them in
bf16, and as much again of their gradient. Here the head itself turns hidden states into the loss,
while ZeRO-3 has its weight gathered, and takes the gradient with respect to them at once; so
backward needs neither logits nor, where the head is frozen, its weight. Tokens that are no target
never reach it.

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
from sparse_lora_dist.tasks.logit_ops import Operation, OperationRecorder
from sparse_lora_dist.zero3.engine import Engine, summed_cross_entropy

CHUNK_BYTES = 2**26
"""Of the logits of one chunk, as fp32; about three such tensors are alive at a time."""


class LossHead(nn.Module):
    """The linear that makes logits; while it is ``expecting`` labels, it makes their loss instead.

    It takes the linear's place in the model and has its parameters, under the same names.
    """

    def __init__(self, linear: FrozenLinear | nn.Linear) -> None:
        super().__init__()
        self._linear = (linear,)  # in a tuple, so that it is no child: names would change
        for name, parameter in linear._parameters.items():
            self.register_parameter(name, parameter)
        self.vocabulary = linear.out_features
        self.after: list[Operation] | None = None
        """What the model does to logits; None until it was seen."""
        self.refused: str | None = None
        """Something it does that needs them whole."""
        self.targets: tuple[Tensor, Tensor] | None = None
        """(where_N among the micro-batch's tokens, labels_N)."""
        self.one_by_one = False
        """Is the loss of each target wanted, not their sum?"""
        self._loss: Tensor | None = None

    def trained(self) -> dict[str, nn.Parameter]:
        """All of its parameters, or none."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def forward(self, x_MTI: Tensor) -> Tensor:
        """Logits; or, while labels are expected, an empty tensor in their place."""
        if self.targets is None:
            return cast(Tensor, self._linear[0](x_MTI))
        if self.one_by_one:
            chunks = self.chunks(self.at_targets(x_MTI))
            self._loss = torch.cat([each_loss(self.logits(x, {}), labels) for x, labels in chunks])
            return x_MTI.new_empty(*x_MTI.shape[:-1], 0)
        trained = self.trained().values()
        logits_MT0: Tensor
        self._loss, logits_MT0 = _SummedLoss.apply(  # type: ignore[no-untyped-call]
            x_MTI, self, torch.is_grad_enabled(), *trained
        )
        # ZeRO-3 gathers a module again for backward if its output takes part in it. A frozen head
        # is not needed there; of a trained one DeepSpeed wants the weight to hang the gradient on.
        return logits_MT0 if trained else logits_MT0.detach()

    def logits(self, x_NI: Tensor, leaves: dict[str, Tensor]) -> Tensor:
        """As the model would return them, with ``leaves`` in place of trained parameters."""
        y_NV: Tensor = functional_call(self._linear[0], leaves, (x_NI,))
        for operation in self.after or []:
            y_NV = operation(y_NV)
        return y_NV

    def at_targets(self, x_MTI: Tensor) -> Tensor:
        """x_NI, of the tokens whose logits are asked for."""
        assert self.targets is not None
        return x_MTI.flatten(0, -2).index_select(0, self.targets[0])

    def chunks(self, x_NI: Tensor) -> Iterable[tuple[Tensor, Tensor]]:
        """(x_NI, labels_N), a few targets at a time."""
        assert self.targets is not None
        rows = max(1, CHUNK_BYTES // (4 * self.vocabulary))
        return zip(x_NI.split(rows), self.targets[1].split(rows), strict=True)

    @contextmanager
    def expecting(self, labels_MT: Tensor, *, one_by_one: bool = False) -> Iterator[None]:
        """Inside, the model returns empty logits, and as ``loss`` the sum over these labels or the
        loss of each."""
        self.one_by_one = one_by_one
        labels_T = labels_MT.flatten()
        # Counted where the labels are, on the host: on a GPU that would wait for it.
        where_N = (labels_T != NOT_A_TARGET).nonzero().squeeze(1)
        self.targets = where_N.to(comm.device()), labels_T[where_N].to(comm.device())
        try:
            yield
        finally:
            self.targets = self._loss = None
            self.one_by_one = False

    def put_loss(self, output: Any) -> None:
        """Into the model's output: DeepSpeed's backward begins at a tensor it has seen there."""
        if self.targets is not None:
            assert self._loss is not None, "the model did not run its output head"
            # A sum over nothing, through which backward comes by a trained head's output.
            output["loss"] = self._loss + output.logits.sum()


class _SummedLoss(torch.autograd.Function):
    """Sum of -log p(label) over the targets. Its gradients are made in forward, chunk by chunk;
    backward multiplies them by the loss's own."""

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
                x.copy_(grad_x)  # done with these: their gradient takes their place
                for part, grad in zip(sums, grads, strict=True):
                    part += grad
        ctx.shape, ctx.where_N, ctx.grad_x_NI = x_MTI.shape, where_N, x_NI
        ctx.grads = [part.to(p.dtype) for part, p in zip(sums, trained, strict=False)]
        return total, x_MTI.new_empty(*x_MTI.shape[:-1], 0)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        scale = grad_outputs[0]
        grad_x_TI = ctx.grad_x_NI.new_zeros(ctx.shape).flatten(0, -2)
        grad_x_TI[ctx.where_N] = (ctx.grad_x_NI * scale).to(grad_x_TI.dtype)
        grads = [(grad * scale).to(grad.dtype) for grad in ctx.grads]
        return grad_x_TI.view(ctx.shape), None, None, *grads


def install(model: PreTrainedModel) -> None:
    """Put a ``LossHead`` in place of the model's output head, where that is a plain linear."""
    head = model.get_output_embeddings()
    name = next((name for name, module in model.named_modules() if module is head), None)
    if name is None:
        return
    if not (isinstance(head, FrozenLinear) or type(head) is nn.Linear):
        print_line(
            "note", f"{name} is no plain linear ({type(head).__name__}): logits are made whole"
        )
        return
    loss_head = LossHead(head)
    model.set_submodule(name, loss_head)
    model.register_forward_hook(lambda module, inputs, output: loss_head.put_loss(output))


def summed_loss(engine: Engine, labels_MT: Tensor, **inputs: Any) -> Tensor:
    """Sum of -log p(label) over the labels of a micro-batch. Collective.

    Args:
        labels_MT: what each token's logits are to say, on the host.
        inputs: of the model, on the device.
    """
    if head := _loss_head(engine, inputs):
        with head.expecting(labels_MT):
            return cast(Tensor, engine(**inputs).loss)
    logits_MTV = engine(**inputs).logits
    return summed_cross_entropy(logits_MTV.flatten(0, 1), labels_MT.flatten().to(comm.device()))


def target_losses(engine: Engine, labels_MT: Tensor, **inputs: Any) -> Tensor:
    """-log p(label) of each target of a micro-batch, fp32 [N], in their order, without gradient.
    Collective. Arguments as of ``summed_loss``."""
    if head := _loss_head(engine, inputs):
        with head.expecting(labels_MT, one_by_one=True):
            return cast(Tensor, engine(**inputs).loss)
    logits_TV, labels_T = engine(**inputs).logits.flatten(0, 1), labels_MT.flatten()
    where_N = labels_T != NOT_A_TARGET
    return each_loss(logits_TV[where_N.to(comm.device())], labels_T[where_N].to(comm.device()))


def each_loss(logits_NV: Tensor, labels_N: Tensor) -> Tensor:
    """-log p(label), fp32 [N]."""
    return F.cross_entropy(logits_NV.float(), labels_N, reduction="none")


def _loss_head(engine: Engine, inputs: dict[str, Any]) -> LossHead | None:
    """The model's, where its logits need not be whole."""
    head = cast(PreTrainedModel, engine.model).get_output_embeddings()
    if not isinstance(head, LossHead):
        return None
    if head.after is None:
        _learn(engine, head, inputs)
    return head if head.refused is None else None


def _learn(engine: Engine, head: LossHead, inputs: dict[str, Any]) -> None:
    """Find out, from two tokens a row, what the model does to logits before it returns them."""
    few = {k: v[:, :2] if isinstance(v, Tensor) else v for k, v in inputs.items()}
    watch = OperationRecorder()
    # After DeepSpeed's own hooks: this is the tensor that the model gets.
    handle = head.register_forward_hook(lambda module, args, y: watch.begin(y))
    with torch.no_grad(), watch:
        logits = engine(**few).logits
    handle.remove()
    watch.end(logits)
    head.after, head.refused = watch.operations, watch.refused
    if head.refused is not None:
        size = megabytes(inputs["input_ids"].numel() * head.vocabulary * logits.element_size())
        print_line(
            "note", f"this architecture does {head.refused} to its logits, so they stay whole:"
        )
        print_line("", f"{size} a micro-batch, and as much again for their gradient")
