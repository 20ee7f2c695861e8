"""Which storages of the frozen base exist after forward, found by weak references and by walking
autograd's graph from the logits."""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest.mock import patch

from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from sparse_lora_dist.adapter.linear import AdapterLinear


@dataclass
class Alive:
    """Bytes by kind: linears (packed, scales and dequantised), embeddings and head, norms."""

    used: dict[str, int]
    """Different storages that forward used."""
    alive: dict[str, int]
    """Of those, still there after it."""
    in_graph: dict[str, int]
    """Of those, reached from the logits through autograd's graph."""


@dataclass
class BaseStorages:
    """Every storage of the base that a forward uses, held weakly."""

    seen: list[tuple[str, StorageWeakRef, int]] = field(default_factory=list)

    def add(self, kind: str, t: Tensor) -> None:
        """Remember the storage of ``t``."""
        storage = t.untyped_storage()
        ref = StorageWeakRef(storage)
        if storage.nbytes() and all(ref.cdata != other.cdata for _, other, _ in self.seen):
            self.seen.append((kind, ref, storage.nbytes()))

    @contextmanager
    def watched(self, model: nn.Module, dequantizers: Iterable[tuple[Any, str]]) -> Iterator[None]:
        """Inside, every frozen parameter that a module finds gathered when it runs is added, and
        whatever the functions ``dequantizers`` (owner, name) return."""
        # After the engine's own hooks, which gather: they were there first.
        handles = [
            module.register_forward_pre_hook(partial(self._add_own, kind_of(name)))
            for name, module in model.named_modules()
        ]
        patches = [patch.object(o, n, self._adding(getattr(o, n))) for o, n in dequantizers]
        for p in patches:
            p.start()
        yield
        for p in patches:
            p.stop()
        for handle in handles:
            handle.remove()

    def _add_own(self, kind: str, module: nn.Module, inputs: Any) -> None:
        # An adapter computes with the tensors of its frozen linear, without calling it.
        parts = [module, module.base] if isinstance(module, AdapterLinear) else [module]
        for part in parts:
            for tensor in [*part.parameters(recurse=False), *part.buffers(recurse=False)]:
                if not tensor.requires_grad and isinstance(tensor, nn.Parameter):
                    self.add(kind, tensor.data)

    def _adding(self, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*args: Any, **kwargs: Any) -> Tensor:
            out = function(*args, **kwargs)
            self.add("linears", out)
            return out

        return call

    def after_forward(self, logits: Tensor) -> Alive:
        """What is left, with the graph still there."""
        kept = {t.untyped_storage()._cdata for t in saved_tensors(logits)}
        # A thread that moved a tensor may let go of it a moment after who waited for it goes on.
        for _ in range(100):
            living = [entry for entry in self.seen if not entry[1].expired()]
            if not any(entry[1].cdata not in kept for entry in living):
                break
            time.sleep(0.02)
        return Alive(
            used=_by_kind(self.seen),
            alive=_by_kind(living),
            in_graph=_by_kind([e for e in living if e[1].cdata in kept]),
        )


def kind_of(module: str) -> str:
    """Which row of the table the parameters of a module belong to."""
    if "norm" in module:
        return "norms"
    return "embeddings and head" if "embed" in module or "lm_head" in module else "linears"


def _by_kind(entries: Iterable[tuple[str, StorageWeakRef, int]]) -> dict[str, int]:
    sums = {"linears": 0, "embeddings and head": 0, "norms": 0}
    for kind, _, size in entries:
        sums[kind] += size
    return sums


def saved_tensors(output: Tensor) -> Iterator[Tensor]:
    """Every tensor that the graph of ``output`` holds for backward."""
    seen, nodes = set(), [output.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        nodes += [parent for parent, _ in node.next_functions]
        yield from _tensors([getattr(node, n) for n in dir(node) if n.startswith("_saved_")])
        # Of functions written in Python: what was saved, and what was just left on the context.
        yield from _tensors(getattr(node, "saved_tensors", ()))
        yield from _tensors(list(getattr(node, "__dict__", {}).values()))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
