"""A training step on shapes alone: the real modules forward and backward on the meta device, where
tensors have sizes and no bytes, with every storage booked while it lives.

So what autograd keeps is counted, not derived: the model is transformers', linears and adapters are
ours, checkpointing is torch's. Layers are alike, so a model of two layers and one of four give the
rest. What a meta device cannot run is asked for with less; the last resort is an error that says
what failed.

Shapes: M rows of a micro-batch, T tokens of a row, I in_features, O out_features.
"""

import copy
import weakref
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from sparse_lora_dist.adapter.dropout import RowSeeds
from sparse_lora_dist.adapter.linear import AdapterLinear
from sparse_lora_dist.base_model.frozen_linear import FrozenLinear
from sparse_lora_dist.base_model.nf4 import BLOCK
from sparse_lora_dist.base_model.shard_loader import is_plain_linear
from sparse_lora_dist.methods.protocol.form import Site
from sparse_lora_dist.methods.protocol.method import Method

FEW, MORE = 2, 4
"""Layers of the two models that are run."""

META = torch.device("meta")


@dataclass(frozen=True, kw_only=True, slots=True)
class StepMemory:
    """Bytes of one micro-batch on one rank, weights not counted."""

    kept: float
    """Alive between forward and backward."""
    forward: float
    """The most at any time of forward, what is kept included."""
    backward: float
    """The same of backward."""


class _Ledger(TorchDispatchMode):
    """Books every storage that an operation makes, until it is freed."""

    def __init__(self, known: Collection[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.alive = self.peak = 0
        self._booked: dict[int, Any] = {}
        for tensor in known:
            self.see(tensor, counts=False)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.see(leaf, counts=True)
        return out

    def see(self, tensor: Tensor, *, counts: bool) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes() if counts else 0
        if key in self._booked:
            return
        self._booked[key] = weakref.finalize(storage, self._free, key, size)
        self.alive += size
        self.peak = max(self.peak, self.alive)

    def _free(self, key: int, size: int) -> None:
        self._booked.pop(key, None)
        self.alive -= size


@contextmanager
def _attention_of_kernels() -> Iterator[None]:
    """The meta device knows the formula with all T x T scores only; what runs on a CPU or GPU
    keeps query, key, value, output, and a number for each row of the scores.

    Not a TorchFunctionMode: it would not be there when checkpointing runs a layer again.
    """
    formula = F.scaled_dot_product_attention
    setattr(F, "scaled_dot_product_attention", _attention)  # noqa: B010
    try:
        yield
    finally:
        setattr(F, "scaled_dot_product_attention", formula)  # noqa: B010


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **others: Any,
) -> Tensor:
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    if attn_mask is not None:
        # Kernels want a mask of numbers, which is made for each layer, and kept.
        attn_mask = torch.empty_like(attn_mask, dtype=query.dtype)
        attn_mask = attn_mask.expand(query.shape[0], -1, query.shape[-2], key.shape[-2])
    out: Tensor = kernel(query, key, value, is_causal=is_causal, attn_mask=attn_mask)[0]
    return out


class _ShapeLinear(FrozenLinear):
    """A quantised linear: what dequantising it holds, for as long as that lasts."""

    def weight_OI(self, dtype: torch.dtype) -> Tensor:
        blocks = self.in_features * self.out_features // BLOCK
        scales = torch.empty(2, blocks, device=META)
        weight_OI = torch.empty(self.out_features, self.in_features, dtype=dtype, device=META)
        del scales
        return weight_OI


class _ShapeSeeds(RowSeeds):
    """Dropout's masks without a generator, of which the meta device has none."""

    def keep_mask(
        self, x_MTI: Tensor, site: str, rows_M: tuple[int, ...], step: int, dropout: float
    ) -> Tensor:
        full_LI = x_MTI.new_empty(self.sequence_length, x_MTI.shape[-1])
        mask = torch.empty_like(x_MTI)
        del full_LI
        return mask


def step_memory(
    model: PreTrainedModel,
    sites: Sequence[Site],
    method: Method,
    *,
    rows: int,
    tokens: int,
    trained: Collection[str],
    checkpointing: bool,
    dropout: float,
    packed: bool,
) -> StepMemory:
    """Of the body of ``model``, which is on the meta device and stays as it is; the head and the
    loss are left out. ``trained`` names the modules trained in full.

    Raises:
        RuntimeError, ValueError, ...: what the model raises where shapes are not enough for it.
    """
    num_layers = len(layers_of(model)[1])
    found = []
    counts = sorted({min(FEW, num_layers), min(MORE, num_layers)})
    for count in counts:
        few = _first_layers(model, count)
        _dress(few, sites, method, dropout, tokens, trained)
        few.train()
        if checkpointing:
            few.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": False}
            )
        found.append(_run(few.base_model, rows, tokens, packed=packed))
    return _extrapolated(found, counts, num_layers)


def layers_of(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Name and list of the layers: the list that holds most of the parameters."""
    lists = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList)]
    if not lists:
        return "", nn.ModuleList()
    return max(lists, key=lambda item: sum(p.numel() for p in item[1].parameters()))


def _extrapolated(found: list[StepMemory], counts: list[int], num_layers: int) -> StepMemory:
    few, more = found[0], found[-1]
    if counts[0] == counts[-1]:
        return few
    times = (num_layers - counts[0]) / (counts[-1] - counts[0])

    def at(name: str) -> float:
        first, second = float(getattr(few, name)), float(getattr(more, name))
        return first + times * (second - first)

    return StepMemory(kept=at("kept"), forward=at("forward"), backward=at("backward"))


def _first_layers(model: PreTrainedModel, count: int) -> PreTrainedModel:
    """A copy with so many layers."""
    name, layers = layers_of(model)
    if not name:
        return copy.deepcopy(model)
    parent, _, leaf = name.rpartition(".")
    holder = model.get_submodule(parent)
    holder._modules[leaf] = layers[:count]
    try:
        few = copy.deepcopy(model)
    finally:
        holder._modules[leaf] = layers
    few.config.num_hidden_layers = count
    few.config.use_cache = False
    return few


def _dress(
    model: PreTrainedModel,
    sites: Sequence[Site],
    method: Method,
    dropout: float,
    tokens: int,
    trained: Collection[str],
) -> None:
    """Frozen linears and adapters where a run has them; nothing else wants a gradient."""
    model.requires_grad_(False)
    seeds = _ShapeSeeds(seed=0, sequence_length=tokens)
    chosen = {site.name: site for site in sites}
    for name, module in list(model.named_modules()):
        if name in trained:
            module.requires_grad_(True)
        elif is_plain_linear(module):
            new: nn.Module = _ShapeLinear(
                module.in_features, module.out_features, module.weight, module.bias
            )
            if name in chosen:
                new = _adapted(new, chosen[name], method, dropout, seeds)
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, new)
    for parameter in model.parameters():
        if parameter.requires_grad:
            # As DeepSpeed does, once it has put the gradient into its bucket.
            parameter.register_post_accumulate_grad_hook(_forget_gradient)


def _forget_gradient(parameter: Tensor) -> None:
    parameter.grad = None


def _adapted(
    base: nn.Module, site: Site, method: Method, dropout: float, seeds: RowSeeds
) -> AdapterLinear:
    assert isinstance(base, FrozenLinear)
    form = method.form(site)
    parameters = {
        key: nn.Parameter(torch.empty(spec.shape, dtype=base.weight.dtype, device=META))
        for key, spec in form.tensors.items()
    }
    for key, kept in form.kept.items():
        raw = torch.empty(kept.num_bytes, dtype=torch.uint8, device=META)
        parameters[key] = nn.Parameter(raw, requires_grad=False)
    return AdapterLinear(
        base, site, method, parameters, alpha=1.0, dropout=dropout, row_seeds=seeds
    )


def _run(body: nn.Module, rows: int, tokens: int, *, packed: bool) -> StepMemory:
    ids_MT = torch.zeros(rows, tokens, dtype=torch.int64, device=META)
    mask = torch.zeros(rows, 1, tokens, tokens, dtype=torch.bool, device=META)
    inputs = {"input_ids": ids_MT, "attention_mask": mask}
    known = [*body.parameters(), *body.buffers(), ids_MT]
    with _Ledger(known) as ledger, _attention_of_kernels():
        ledger.see(mask, counts=packed)
        out = body(**inputs)[0]
        kept, forward = ledger.alive, ledger.peak
        ledger.peak = ledger.alive
        torch.autograd.backward(out, torch.empty_like(out))
        return StepMemory(kept=kept, forward=forward, backward=ledger.peak)
