"""What an architecture does to its logits before it returns them: seen, not looked up in a list.

Most do nothing, Gemma 2 caps them softly, Granite and Cohere scale them. Whatever torch calls
pointwise can be done to the logits of a few tokens as well; anything else cannot.

Shapes: N tokens, V vocabulary.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Operation = Callable[[Tensor], Tensor]
"""logits_NV -> logits_NV, entry by entry."""


class OperationRecorder(TorchDispatchMode):
    """Follows one tensor through whatever is computed from it."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations: list[Operation] = []
        self.refused: str | None = None
        """The first operation that is not entry by entry, or not on the latest result alone."""
        self._results: list[Tensor] = []  # all held, so that no address is used twice

    def begin(self, logits: Tensor) -> None:
        """Follow these."""
        self._results.append(logits)

    def end(self, logits: Tensor) -> None:
        """What is followed must have become these."""
        if not (self._results and is_same(logits, self._results[-1])):
            self.refused = self.refused or "something unseen"

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
    """The same numbers in the same place: DeepSpeed's hooks and views make new tensor objects."""
    return (
        isinstance(a, Tensor)
        and a.data_ptr() == b.data_ptr()
        and (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)
    )


def is_pointwise(func: Any) -> bool:
    """A cast is; torch does not tag it so."""
    if func._schema.is_mutable:
        return False
    return torch.Tag.pointwise in func.tags or func is torch.ops.aten._to_copy.default


def again(func: Any, args: Any, kwargs: Any) -> Operation:
    """The operation, on another tensor in the place of the only one."""

    def operation(y: Tensor) -> Tensor:
        out: Tensor = func(*(y if isinstance(a, Tensor) else a for a in args), **kwargs)
        return out

    return operation
