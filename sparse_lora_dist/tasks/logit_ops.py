"""Record what an architecture does to its logits between its output head and its output.

Most architectures do nothing, Gemma 2 caps logits softly, Granite and Cohere scale them. The
operations are observed in a forward, so no list of architectures is needed. Operations that torch
tags as pointwise can be applied to the logits of a few tokens at a time; others cannot.

Shapes: N tokens, V vocabulary.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Operation = Callable[[Tensor], Tensor]
"""Pointwise function logits_NV -> logits_NV."""


class OperationRecorder(TorchDispatchMode):
    """Dispatch mode that records the chain of pointwise operations applied to one tensor.

    ``begin`` names the tensor, and ``end`` the result that it should have become.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations: list[Operation] = []
        """The operations recorded so far, in their order."""
        self.refused: str | None = None
        """The first operation that is not pointwise, or that takes more than the latest result."""
        self._results: list[Tensor] = []  # keeps all alive, so that no address is used twice

    def begin(self, logits: Tensor) -> None:
        """Record what is done to this tensor."""
        self._results.append(logits)

    def end(self, logits: Tensor) -> None:
        """Check that the recorded operations led to this tensor."""
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
    """Return whether ``a`` is the same memory, shape and dtype as ``b``.

    Not ``a is b``: DeepSpeed's hooks and views make new tensor objects.
    """
    return (
        isinstance(a, Tensor)
        and a.data_ptr() == b.data_ptr()
        and (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)
    )


def is_pointwise(func: Any) -> bool:
    """Return whether an operator is pointwise. Casts are, though torch does not tag them so."""
    if func._schema.is_mutable:
        return False
    return torch.Tag.pointwise in func.tags or func is torch.ops.aten._to_copy.default


def again(func: Any, args: Any, kwargs: Any) -> Operation:
    """Return ``func`` as a function of the one tensor among its arguments."""

    def operation(y: Tensor) -> Tensor:
        out: Tensor = func(*(y if isinstance(a, Tensor) else a for a in args), **kwargs)
        return out

    return operation
