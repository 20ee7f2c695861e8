"""Record the operations that a model applies to the logits which its output head returns.

Most architectures apply none. Gemma 2 caps logits softly; Granite and Cohere scale them. The
operations are observed in a forward, so no list of architectures is needed. Pointwise operations,
which torch tags so, can be applied to the logits of a few tokens at a time; others cannot.

Shapes: N tokens, V vocabulary.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Operation = Callable[[Tensor], Tensor]
"""Pointwise function: logits [tokens, vocabulary] -> logits of the same shape."""


class OperationRecorder(TorchDispatchMode):
    """Dispatch mode of torch that records the chain of pointwise operations applied to one tensor.

    Use it as a context manager around the model's forward. Call ``begin`` with the logits of the
    head, and ``end`` with the logits that the model returns. Then ``operations`` is the chain that
    turns the head's logits into the model's. If the chain cannot be recorded, ``refused`` names the
    operation that prevents it; otherwise ``refused`` is None.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations: list[Operation] = []
        """The operations recorded so far, in their order."""
        self.refused: str | None = None
        """Name of the first operation that is not pointwise or that takes other tensors besides the
        latest result. None if there is none."""
        self._results: list[Tensor] = []  # keeps all alive, so that no address is used twice

    def begin(self, logits: Tensor) -> None:
        """Start recording the operations that are applied to ``logits``, the head's output."""
        self._results.append(logits)

    def end(self, logits: Tensor) -> None:
        """Set ``refused`` if ``logits``, the model's output, is not the result of the recorded
        operations."""
        if not (self._results and is_same(logits, self._results[-1])):
            self.refused = self.refused or "an unrecorded operation"

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if not any(is_same(t, result) for t in tensors for result in self._results):
            return out
        latest = self._results[-1]
        if is_same(out, latest) and not func._schema.is_mutable:
            return out  # an alias
        if len(tensors) == 1 and is_same(tensors[0], latest) and is_pointwise(func):
            self.operations.append(again(func, args, kwargs))
            self._results.append(out)
        else:
            self.refused = self.refused or str(func)
        return out


def is_same(a: Any, b: Tensor) -> bool:
    """Return True if ``a`` is a tensor with the memory, shape, strides and dtype of ``b``.

    ``a is b`` would not do: DeepSpeed's hooks and views make new tensor objects.
    """
    return (
        isinstance(a, Tensor)
        and a.data_ptr() == b.data_ptr()
        and (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)
    )


def is_pointwise(func: Any) -> bool:
    """Return True if an ATen operator is pointwise and changes no argument.

    A cast counts as pointwise, though torch does not tag it so.
    """
    if func._schema.is_mutable:
        return False
    return torch.Tag.pointwise in func.tags or func is torch.ops.aten._to_copy.default


def again(func: Any, args: Any, kwargs: Any) -> Operation:
    """Return a function that repeats a recorded call of an operator on another tensor.

    Args:
        func: ATen operator.
        args: positional arguments of the recorded call. Each tensor among them is replaced by the
            function's argument.
        kwargs: keyword arguments of the recorded call.
    """

    def operation(y: Tensor) -> Tensor:
        out: Tensor = func(*(y if isinstance(a, Tensor) else a for a in args), **kwargs)
        return out

    return operation
