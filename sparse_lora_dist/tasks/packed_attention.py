"""Attention of packed documents by the lengths of the documents, without a mask of T x T.

transformers' sdpa tells packed documents apart by a mask [M, 1, T, T], copies keys and values to
every query head for it, and computes what lies after a token too. torch's ``varlen_attn`` (flash
attention) takes the bounds of the documents instead. This file registers it with transformers under
the name ``VARLEN``. In a forward inside ``packed``, a ``PackedMask`` goes through the model in the
place of the mask. It is an argument of each layer, so activation checkpointing has it again when it
runs the layer again in backward. In any other forward the name is the same as sdpa.

Shapes: M rows of a micro-batch, T tokens of a row, N = M T tokens, C documents, H query heads,
K key and value heads, D size of a head.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from sparse_lora_dist.config.sections import VARLEN
from sparse_lora_dist.distributed.device import moved
from sparse_lora_dist.errors import in_words

DTYPES = (torch.bfloat16, torch.float16)
"""Dtypes that the kernel takes."""
LARGEST_HEAD, HEAD_STEP = 256, 8
"""The kernel takes heads of a size up to the first number that is a multiple of the second."""
NOT_TAKEN = {
    "softcap": "it caps its attention scores (softcap)",
    "s_aux": "its attention has sinks",
    "position_bias": "it adds a bias to its attention scores",
}
"""Argument of an attention function that the kernel has no place for -> why it cannot be used."""

Sizes = tuple[int, int, int]
"""Query heads, key and value heads, and size of a head (H, K, D in shapes)."""


@dataclass
class Documents:
    """Documents of one micro-batch. The padding of a row is a document of its own."""

    position_ids_MT: Tensor
    """Positions on the CPU, which restart where a document or the padding begins."""
    device: torch.device
    """Device of the model."""
    sizes: set[Sizes] = field(default_factory=set)
    """Sizes of the layers of which the kernel takes the attention, noted in forward."""
    reasons: set[str] = field(default_factory=set)
    """Why the kernel does not take that of the others."""

    @cached_property
    def starts_MT(self) -> Tensor:
        """True at the first token of each document; on the CPU."""
        restarts = self.position_ids_MT.diff(dim=1) != 1
        return F.pad(restarts, (1, 0), value=True)

    @cached_property
    def _host_bounds(self) -> Tensor:
        starts_C = self.starts_MT.flatten().nonzero().squeeze(1)
        return F.pad(starts_C, (0, 1), value=self.starts_MT.numel()).int()

    @cached_property
    def bounds(self) -> Tensor:
        """Int32 [C + 1] on the device: the first token of each document among all N, and N."""
        return moved(self.device, self._host_bounds)[0]

    @cached_property
    def longest(self) -> int:
        """Number of tokens of the longest document."""
        return int(self._host_bounds.diff().max())


@dataclass(frozen=True, eq=False)
class PackedMask:
    """What layers get in place of a mask: a token sees those before it in its document, and
    itself."""

    documents: Documents
    window: int | None
    """Number of tokens that a token sees at most, itself included; None: no limit."""

    @cached_property
    def whole_M1TT(self) -> Tensor:
        """The mask that sdpa takes, True where a query sees a key."""
        rows_MT = self.documents.starts_MT.cumsum(dim=1).to(self.documents.device)
        places_T = torch.arange(rows_MT.shape[1], device=self.documents.device)
        back_TT = places_T[:, None] - places_T
        seen_TT = (back_TT >= 0) & (back_TT < (self.window or len(places_T)))
        return (rows_MT[:, None, :, None] == rows_MT[:, None, None, :]) & seen_TT


_documents: ContextVar[Documents | None] = ContextVar("documents", default=None)


@contextmanager
def packed(position_ids_MT: Tensor, device: torch.device) -> Iterator[Documents]:
    """Context manager in which a forward of the model is over these packed documents.

    It has no effect on a model whose attention is not ``VARLEN``: nothing is computed or copied
    then. Backward may run outside. Not a collective.

    Args:
        position_ids_MT: positions, which restart where a document or the padding begins, int64, on
            the CPU.
        device: device of the model.

    Yields:
        The documents. After the forward they have the sizes of the layers that ran.
    """
    documents = Documents(position_ids_MT, device)
    before = _documents.set(documents)
    try:
        yield documents
    finally:
        _documents.reset(before)


def _mask(**asked: Any) -> Tensor | PackedMask | None:
    """Mask function of ``VARLEN``, with the arguments of transformers' ``sdpa_mask``."""
    documents = _documents.get()
    if documents is None or not _is_causal_over(documents, asked):
        return sdpa_mask(**asked)
    return PackedMask(documents, asked.get("local_size"))


def _is_causal_over(documents: Documents, asked: Mapping[str, Any]) -> bool:
    """Return True if a causal mask over the documents is asked for, with or without a window."""
    rows, tokens = documents.position_ids_MT.shape
    sizes = (asked["batch_size"], asked["q_length"], asked["kv_length"])
    window, chunk = asked.get("local_size"), getattr(asked["config"], "attention_chunk_size", None)
    return (
        sizes == (rows, tokens, tokens)
        and asked.get("attention_mask") is None
        and not asked["use_vmap"]  # a function of the model's own
        and "allow_is_bidirectional_skip" not in asked  # tokens see those after them
        and (window is None or window != chunk)  # chunks, as in Llama 4
    )


def _attention(
    module: nn.Module,
    query_MHTD: Tensor,
    key_MKTD: Tensor,
    value_MKTD: Tensor,
    attention_mask: Tensor | PackedMask | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention function of ``VARLEN``, with the arguments of transformers' sdpa. Returns the
    output [M, T, H, D], and None in place of weights."""
    q, k, v, mask = query_MHTD, key_MKTD, value_MKTD, attention_mask
    if isinstance(mask, PackedMask):
        reason = _why_not(q, k, v, dropout, others)
        if reason is None:
            mask.documents.sizes.add((q.shape[1], k.shape[1], q.shape[3]))
            if _has_kernel(q):
                return _by_lengths(q, k, v, mask, scaling), None
        else:
            mask.documents.reasons.add(reason)
        mask = mask.whole_M1TT
    y_MTHD, _ = sdpa_attention_forward(
        module, q, k, v, mask, dropout=dropout, scaling=scaling, **others
    )
    return y_MTHD, None


def _has_kernel(query_MHTD: Tensor) -> bool:
    """Return False on a CPU, where a model is only looked at, and in fp32."""
    return query_MHTD.device.type != "cpu" and query_MHTD.dtype in DTYPES


def _why_not(
    query_MHTD: Tensor,
    key_MKTD: Tensor,
    value_MKTD: Tensor,
    dropout: float,
    others: Mapping[str, Any],
) -> str | None:
    """Return why the kernel cannot compute the attention of a layer; None if it can."""
    size = query_MHTD.shape[3]
    if size > LARGEST_HEAD or size % HEAD_STEP:
        return (
            f"its attention heads have a size of {size}, and the kernel takes multiples of "
            f"{HEAD_STEP} up to {LARGEST_HEAD}"
        )
    if value_MKTD.shape != key_MKTD.shape or key_MKTD.shape[2:] != query_MHTD.shape[2:]:
        return "its queries, keys and values differ in size"
    if dropout:
        return "its attention has dropout"
    return next((why for name, why in NOT_TAKEN.items() if others.get(name) is not None), None)


def _by_lengths(
    query_MHTD: Tensor,
    key_MKTD: Tensor,
    value_MKTD: Tensor,
    mask: PackedMask,
    scaling: float | None,
) -> Tensor:
    rows, heads, tokens, size = query_MHTD.shape
    assert (rows, tokens) == mask.documents.position_ids_MT.shape
    bounds, longest = mask.documents.bounds, mask.documents.longest
    # The kernel's window counts the keys before a query, transformers' counts the query's own too.
    far = mask.window is None or mask.window >= longest
    left = -1 if far else cast(int, mask.window) - 1
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query_MHTD, key_MKTD, value_MKTD))
    y_NHD = varlen_attn(
        q,
        k,
        v,
        bounds,
        bounds,
        longest,
        longest,
        scale=scaling,
        window_size=(left, 0),
        enable_gqa=key_MKTD.shape[1] != heads,
    )
    return cast(Tensor, y_NHD).view(rows, tokens, heads, size)


def why_no_kernel(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> str | None:
    """Run the kernel forward and backward on a few tokens, and return why it cannot run on this
    device; None if it can. Not a collective.

    Args:
        sizes: numbers of heads and their size.
        dtype: dtype of the run.
        device: the rank's GPU.
    """
    heads, key_heads, size = sizes
    q, k, v = (
        torch.zeros(1, count, HEAD_STEP, size, dtype=dtype, device=device, requires_grad=True)
        for count in (heads, key_heads, key_heads)
    )
    mask = PackedMask(Documents(torch.arange(HEAD_STEP)[None], device), window=2)
    try:
        _by_lengths(q, k, v, mask, None).sum().backward()
    except Exception as error:  # whatever a GPU or a build without the kernel raises
        return in_words(error)
    return None


AttentionInterface.register(VARLEN, _attention)
AttentionMaskInterface.register(VARLEN, _mask)
