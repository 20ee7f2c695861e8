"""Measures the activation memory of a training step by running it on the meta device.

The model is transformers', its linears and adapters are those of training, and every tensor storage
is counted while it exists. Copies of the model with two and with four layers are run, and the
memory of all layers is extrapolated linearly from them. Operations that the meta device cannot run
(attention kernels, dequantisation, random numbers) are replaced by ones that take the same memory.

Shapes: M rows of a micro-batch, T tokens of a row, L tokens of a full row, I in_features,
O out_features.
"""

import copy
import weakref
from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel, masking_utils

from sparse_lora_dist.adapter.dropout import RowSeeds
from sparse_lora_dist.adapter.input_statistics import InputStatistics
from sparse_lora_dist.adapter.linear import AdapterLinear
from sparse_lora_dist.base_model.frozen_linear import FrozenLinear
from sparse_lora_dist.base_model.nf4 import BLOCK
from sparse_lora_dist.base_model.shard_loader import is_plain_linear
from sparse_lora_dist.methods.protocol.form import Site
from sparse_lora_dist.methods.protocol.method import Method
from sparse_lora_dist.tasks.packed_attention import packed as packed_documents
from sparse_lora_dist.zero3.layers import layers_of

FEW, MORE = 2, 4
"""Numbers of layers of the two copies of the model that are run."""

META = torch.device("meta")


@dataclass(frozen=True, kw_only=True, slots=True)
class StepMemory:
    """Memory of activations and temporaries of one micro-batch on one rank, without weights."""

    kept: float
    """Bytes that exist between forward and backward: activations saved for backward, the output."""
    forward: float
    """Peak bytes of forward, ``kept`` included."""
    backward: float
    """Peak bytes of backward, ``kept`` included."""


class _StorageMeter(TorchDispatchMode):
    """Mode that counts the bytes of every tensor storage from its creation until it is freed.

    ``alive`` is the number of bytes that exist now, ``peak`` the highest number so far; both begin
    at 0.

    Args:
        known: tensors that are never counted, such as weights.
    """

    def __init__(self, known: Collection[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.alive = self.peak = 0
        self._tracked: dict[int, Any] = {}
        for tensor in known:
            self.track(tensor, counts=False)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.track(leaf, counts=True)
        return out

    def track(self, tensor: Tensor, *, counts: bool) -> None:
        """Register the storage of ``tensor``; a storage that is registered already is left alone.

        ``counts`` is True if its bytes count until it is freed, False if they never count.
        """
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes() if counts else 0
        if key in self._tracked:
            return
        self._tracked[key] = weakref.finalize(storage, self._free, key, size)
        self.alive += size
        self.peak = max(self.peak, self.alive)

    def _free(self, key: int, size: int) -> None:
        self._tracked.pop(key, None)
        self.alive -= size


def _attention_of_kernels() -> AbstractContextManager[None]:
    """Context manager that replaces torch's attention by one with the memory of a fused kernel.

    Fused kernels on a CPU or GPU keep for backward the query, key, value, output and one number per
    query. On the meta device, torch would instead compute and keep the scores of every token for
    every token of a row. This is not a TorchFunctionMode, because that would not be active when
    gradient checkpointing runs a layer again.
    """
    return _replaced(F, "scaled_dot_product_attention", _attention)


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
        # Kernels need a float mask, which is made in each layer and kept for backward.
        attn_mask = torch.empty_like(attn_mask, dtype=query.dtype)
        attn_mask = attn_mask.expand(query.shape[0], -1, query.shape[-2], key.shape[-2])
    out: Tensor = kernel(query, key, value, is_causal=is_causal, attn_mask=attn_mask)[0]
    return out


class _MetaLinear(FrozenLinear):
    """A frozen linear whose ``weight_OI`` allocates as much memory as dequantising a 4-bit weight
    does: the result and, until it is returned, two fp32 values per block of the weight."""

    def weight_OI(self, dtype: torch.dtype) -> Tensor:
        blocks = self.in_features * self.out_features // BLOCK
        scales = torch.empty(2, blocks, device=META)
        weight_OI = torch.empty(self.out_features, self.in_features, dtype=dtype, device=META)
        del scales
        return weight_OI


class _MetaSeeds(RowSeeds):
    """Makes dropout masks without drawing random numbers, which the meta device cannot do. They
    take the same memory as real masks."""

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
    """Measure the memory of forward and backward of a model, without its output head and the loss.

    Args:
        model: a model on the meta device; it is copied, not changed.
        sites: linears that carry adapters.
        method: the method, which gives the tensors of each adapter and how they act.
        rows: number of rows, that is sequences, of the micro-batch.
        tokens: number of tokens of each row.
        trained: names of modules trained in full.
        checkpointing: True if gradient checkpointing runs each layer again in backward.
        dropout: probability with which dropout zeroes an entry of the adapters' inputs.
        packed: True if a row may hold several documents; what keeps them apart, such as attention
            masks, is then counted.

    Returns:
        Bytes between forward and backward, and peak bytes of each.

    Raises:
        Exception: whatever the model raises if it cannot run on the meta device.
    """
    num_layers = len(layers_of(model)[1])
    found = []
    counts = sorted({min(FEW, num_layers), min(MORE, num_layers)})
    for count in counts:
        few = _first_layers(model, count)
        seeds = _MetaSeeds(seed=0, sequence_length=tokens)
        seeds.begin((0,) * rows, (tokens,) * rows, num_positions=tokens)
        _inject(few, sites, method, dropout, seeds, trained)
        few.train()
        if checkpointing:
            few.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": False}
            )
        found.append(_run(few.base_model, rows, tokens, packed=packed))
    return _extrapolated(found, counts, num_layers)


def _extrapolated(found: list[StepMemory], counts: list[int], num_layers: int) -> StepMemory:
    """Extrapolate the memory linearly to ``num_layers`` layers; ``found[i]`` was measured on a
    model of ``counts[i]`` layers."""
    few, more = found[0], found[-1]
    if counts[0] == counts[-1]:
        return few
    times = (num_layers - counts[0]) / (counts[-1] - counts[0])

    def at(name: str) -> float:
        first, second = float(getattr(few, name)), float(getattr(more, name))
        return first + times * (second - first)

    return StepMemory(kept=at("kept"), forward=at("forward"), backward=at("backward"))


def _first_layers(model: PreTrainedModel, count: int) -> PreTrainedModel:
    """Return a copy of the model with its first ``count`` layers only."""
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


def _inject(
    model: PreTrainedModel,
    sites: Sequence[Site],
    method: Method,
    dropout: float,
    seeds: RowSeeds,
    trained: Collection[str],
) -> None:
    """Change ``model`` in place as training does.

    Linears become frozen linears, with adapters at ``sites``. All other parameters are frozen,
    except those of modules in ``trained``. The arguments are those of ``step_memory``.
    """
    model.requires_grad_(False)
    chosen = {site.name: site for site in sites}
    for name, module in list(model.named_modules()):
        if name in trained:
            module.requires_grad_(True)
        elif is_plain_linear(module):
            new: nn.Module = _MetaLinear(
                module.in_features, module.out_features, module.weight, module.bias
            )
            if name in chosen:
                new = _adapted(new, chosen[name], method, dropout, seeds)
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, new)
    for parameter in model.parameters():
        if parameter.requires_grad:
            # DeepSpeed, too, frees a gradient once it has copied it to its bucket.
            parameter.register_post_accumulate_grad_hook(_free_gradient)


def _free_gradient(parameter: Tensor) -> None:
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
    adapter = AdapterLinear(
        base, site, method, parameters, alpha=1.0, dropout=dropout, row_seeds=seeds
    )
    if (now := method.rewriting) is not None:  # its gradients are counted in ``memory``
        squares, rows = now.squares_decay is not None, now.collects_rows is not None
        adapter.input_statistics = InputStatistics(squares=squares, rows=rows)
    return adapter


def _run(body: nn.Module, rows: int, tokens: int, *, packed: bool) -> StepMemory:
    ids_MT, positions_MT = torch.zeros(2, rows, tokens, dtype=torch.int64, device=META)
    inputs: dict[str, Any] = {"input_ids": ids_MT, "position_ids": positions_MT}
    if not packed:
        mask = torch.zeros(rows, 1, tokens, tokens, dtype=torch.bool, device=META)
        inputs = {"input_ids": ids_MT, "attention_mask": mask}
    known = [*body.parameters(), *body.buffers(), *inputs.values()]
    with _documents(rows, tokens), _attention_of_kernels(), _StorageMeter(known) as meter:
        out = body(**inputs, use_cache=False)[0]
        kept, forward = meter.alive, meter.peak
        meter.peak = meter.alive
        torch.autograd.backward(out, torch.empty_like(out))
        return StepMemory(kept=kept, forward=forward, backward=meter.peak)


@contextmanager
def _documents(rows: int, tokens: int) -> Iterator[None]:
    """Context manager in which a forward that has positions and no mask is over packed documents.

    transformers reads the values of the positions to find them, and then makes a mask for each kind
    of layer. On the meta device there are no values. The attention for packed documents makes no
    mask, and its memory does not depend on how many documents there are.
    """
    one_a_row = torch.arange(tokens).expand(rows, tokens)
    found = _replaced(masking_utils, "find_packed_sequence_indices", torch.empty_like)
    with found, packed_documents(one_a_row, META) as documents:
        _ = documents.bounds, documents.longest  # now, as training makes them on the host
        yield


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    usual = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, usual)
