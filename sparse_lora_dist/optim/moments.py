"""Adam's moments of one chunk of a shard, packed to the entries that live, and how they are stored.

Shapes: N entries of the chunk, L of them live, K steps after which some of these came to life,
B blocks of 8-bit values.
"""

from collections.abc import Sequence
from functools import cache

import torch
from bitsandbytes.functional import create_dynamic_map, dequantize_blockwise, quantize_blockwise
from torch import Tensor

from sparse_lora_dist.methods.shared.bit_masks import pack_bits, unpack_bits

MOMENTS = ("exp_avg", "exp_avg_sq")

BLOCK = 256
"""8-bit values that share a scale."""


class Fp32:
    """A moment as it is."""

    def __init__(self, values_L: Tensor, *, signed: bool) -> None:
        self.tensors: tuple[Tensor, ...] = (values_L,)

    def read(self) -> Tensor:
        """fp32 [L], to be changed in place and written back."""
        return self.tensors[0]

    def write(self, values_L: Tensor) -> None:
        """Keep these from now on."""
        self.tensors = (values_L,)


class EightBit:
    """A moment in Dettmers et al. 2021's blockwise dynamic 8-bit code, arXiv:2110.02861.

    Two changes. A negative maximum of a block is a code of its own, like a positive one: otherwise
    it would shrink by 0.7 % at every step. And of ``exp_avg_sq`` only zero is stored as zero, or
    the next update of an entry that is small in its block would be without bound (zero-point
    problem: Li et al. 2023, arXiv:2309.01507). What ``read`` gives is written to the same bytes.
    """

    def __init__(self, values_L: Tensor, *, signed: bool) -> None:
        self.signed = signed
        self.write(values_L)

    def read(self) -> Tensor:
        """fp32 [L], a copy."""
        codes_L, absmax_B = self.tensors
        if codes_L.numel() == 0:
            return absmax_B
        code = dynamic_code(self.signed, codes_L.device)
        values_L: Tensor = dequantize_blockwise(
            codes_L, absmax=absmax_B, code=code, blocksize=BLOCK
        )
        return values_L

    def write(self, values_L: Tensor) -> None:
        """Keep these from now on, as nearly as eight bits can."""
        if values_L.numel() == 0:  # bitsandbytes would launch a CUDA kernel of no blocks
            self.tensors = values_L.byte(), values_L
            return
        code, rounded_L = dynamic_code(self.signed, values_L.device), values_L
        # Twice: the CPU kernel rounds by a table too coarse for the smallest codes, whose own
        # values it moves to the neighbour; there they stay.
        for _ in range(2):
            codes_L, scale = quantize_blockwise(rounded_L, code=code, blocksize=BLOCK)
            rounded_L = dequantize_blockwise(codes_L, scale)
        if not self.signed:
            codes_L.clamp_(min=1)
        # By that table zero is not reached either, which newborn entries need.
        codes_L.masked_fill_(values_L == 0, 127 if self.signed else 0)
        self.tensors = codes_L, scale.absmax


@cache
def dynamic_code(signed: bool, device: torch.device) -> Tensor:
    """What each of the 256 codes stands for, in maxima of its block."""
    code: Tensor = create_dynamic_map(signed=signed)
    if signed:
        code[0] = -1.0
    return code.to(device)


class Packed:
    """State of a chunk: a bit an entry, and of live ones two moments and when they came to life.

    ``births`` lists the steps after which entries came to life; ``birth_L`` says for each which of
    them it was, and is there only where there are several.
    """

    def __init__(
        self,
        live_N: Tensor,
        exp_avg_N: Tensor,
        exp_avg_sq_N: Tensor,
        born_N: Tensor,
        *,
        eight_bit: bool,
    ) -> None:
        self.size, self.count = live_N.numel(), int(live_N.sum())
        self.bits = pack_bits(live_N)
        moment = EightBit if eight_bit else Fp32
        self.exp_avg = moment(exp_avg_N[live_N], signed=True)
        self.exp_avg_sq = moment(exp_avg_sq_N[live_N], signed=False)
        born_L = born_N[live_N]
        births_K = born_L.bincount().nonzero().flatten().int()  # Tensor.unique would sort them all
        assert len(births_K) <= 2**15, "births are counted in int16"
        self.births: list[int] = births_K.tolist()
        self.birth_L: Tensor | None = None
        if len(births_K) > 1:
            self.birth_L = torch.searchsorted(births_K, born_L, out_int32=True).to(torch.int16)

    def live(self) -> Tensor:
        """bool [N]"""
        return unpack_bits(self.bits, self.size)

    def where(self) -> Tensor | None:
        """Positions of the live entries, [L]; None: all live."""
        return None if self.count == self.size else self.live().nonzero().flatten()

    def spread(self, values_L: Tensor) -> Tensor:
        """[N], zero where nothing lives."""
        if self.count == self.size:  # a tenth of the time, which saving waits for
            return values_L.clone()
        out_N = torch.zeros(self.size, dtype=values_L.dtype, device=values_L.device)
        out_N[self.live()] = values_L
        return out_N

    def born(self) -> Tensor:
        """The step after which each entry came to life, int32 [N], zero where nothing lives."""
        births_K = torch.tensor(self.births, dtype=torch.int32, device=self.bits.device)
        born_L = births_K.expand(self.count) if self.birth_L is None else self._pick(births_K)
        return self.spread(born_L)

    def per_entry(self, values_K: Sequence[float]) -> float | Tensor:
        """A value for each birth -> one for each live entry, or for all where they share it."""
        if len(set(values_K)) == 1:
            return values_K[0]
        return self._pick(torch.tensor(values_K, dtype=torch.float32, device=self.bits.device))

    def nbytes(self) -> int:
        """Of all storages."""
        tensors = [self.bits, *self.exp_avg.tensors, *self.exp_avg_sq.tensors]
        if self.birth_L is not None:
            tensors.append(self.birth_L)
        return sum(t.untyped_storage().nbytes() for t in tensors)

    def _pick(self, values_K: Tensor) -> Tensor:
        assert self.birth_L is not None
        return values_K[self.birth_L.int()]
