"""Store Adam's moments of one chunk of a shard, for live entries only, in fp32 or 8 bits.

A chunk is a range of consecutive entries of a shard. An entry is live if the optimizer steps it,
and dead otherwise. Its birth step is the number of optimizer steps that were done when it became
live.

Shapes: N entries of the chunk, L live entries among them, K distinct birth steps of the live
entries, B blocks of 8-bit values.
"""

from collections.abc import Sequence
from functools import cache

import torch
from bitsandbytes.functional import create_dynamic_map, dequantize_blockwise, quantize_blockwise
from torch import Tensor

from sparse_lora_dist.methods.shared.bit_masks import pack_bits, unpack_bits

MOMENTS = ("exp_avg", "exp_avg_sq")
"""Names of the first and second moment, as in torch.optim.AdamW."""

BLOCK = 256
"""Number of 8-bit values that share a scale, the largest absolute value among them."""


class Fp32:
    """One of Adam's moments of the live entries, stored in fp32.

    Args:
        values_L: the moment, fp32, one value per live entry.
        signed: unused. It is here because ``EightBit``, which takes the same arguments, needs it.
    """

    def __init__(self, values_L: Tensor, *, signed: bool) -> None:
        self.tensors: tuple[Tensor, ...] = (values_L,)

    def read(self) -> Tensor:
        """Return the stored moment itself, not a copy: fp32, one value per live entry."""
        return self.tensors[0]

    def write(self, values_L: Tensor) -> None:
        """Replace the stored moment by ``values_L``: fp32, one value per live entry."""
        self.tensors = (values_L,)


class EightBit:
    """One of Adam's moments of the live entries, stored in 8 bits.

    Each block of 256 values is stored as 8-bit codes and one scale, the largest absolute value of
    the block. A code stands for a fraction of the scale (blockwise dynamic quantisation, Dettmers
    et al. 2021, arXiv:2110.02861). Two things differ from bitsandbytes:

    - The fraction -1.0 has a code, as 1.0 has. Without this code, an entry whose value is minus the
      scale would shrink by 0.7 % at every step.
    - A positive entry of ``exp_avg_sq`` is never stored as zero. If it were, the next update of an
      entry that is small in its block would be unbounded (the zero-point problem of Li et al. 2023,
      arXiv:2309.01507).

    Calling ``write`` with what ``read`` returned stores the same bytes again.

    Args:
        values_L: the moment, fp32, one value per live entry.
        signed: True if values may be negative: True for ``exp_avg``, False for ``exp_avg_sq``.
    """

    def __init__(self, values_L: Tensor, *, signed: bool) -> None:
        self.signed = signed
        self.write(values_L)

    def read(self) -> Tensor:
        """Return the moment decoded to fp32, one value per live entry."""
        codes_L, absmax_B = self.tensors
        if codes_L.numel() == 0:
            return absmax_B
        code = dynamic_code(self.signed, codes_L.device)
        values_L: Tensor = dequantize_blockwise(
            codes_L, absmax=absmax_B, code=code, blocksize=BLOCK
        )
        return values_L

    def write(self, values_L: Tensor) -> None:
        """Replace the stored moment by ``values_L``, rounded to 8-bit codes.

        Args:
            values_L: the moment, fp32, one value per live entry.
        """
        if values_L.numel() == 0:  # bitsandbytes would launch a CUDA kernel with no blocks
            self.tensors = values_L.byte(), values_L
            return
        code, rounded_L = dynamic_code(self.signed, values_L.device), values_L
        # Twice: the CPU kernel's rounding table is too coarse for the smallest codes, and moves the
        # value of such a code to its neighbour, where it stays. The second round reaches that.
        for _ in range(2):
            codes_L, scale = quantize_blockwise(rounded_L, code=code, blocksize=BLOCK)
            rounded_L = dequantize_blockwise(codes_L, scale)
        if not self.signed:
            codes_L.clamp_(min=1)
        # The table does not reach zero either, which entries that come to life start from.
        codes_L.masked_fill_(values_L == 0, 127 if self.signed else 0)
        self.tensors = codes_L, scale.absmax


@cache
def dynamic_code(signed: bool, device: torch.device) -> Tensor:
    """Return the value of each 8-bit code, as a fraction of its block's largest absolute value.

    Args:
        signed: True for codes from -1 to 1, False for codes from 0 to 1.
        device: device of the result.

    Returns:
        fp32 [256]: value of code 0, of code 1, and so on.
    """
    code: Tensor = create_dynamic_map(signed=signed)
    if signed:
        code[0] = -1.0
    return code.to(device)


class Packed:
    """Optimizer state of a chunk: a live bit per entry; moments and birth steps of live entries.

    A chunk is a range of consecutive entries of a rank's flat shard. Values are stored for live
    entries only, in the order of the chunk. Example: a chunk of N = 8 entries, of which
    L = 3 are live, two since the start and one since step 20, so there are K = 2 birth steps:

        entry of the chunk      0    1    2    3    4    5    6    7
        live                    no   yes  no   no   yes  yes  no   no     bits = [0b00110010]
        exp_avg, exp_avg_sq          [0]            [1]  [2]              L values each
        birth step                   0              20   0                births = [0, 20]
                                                                          birth_L = [0, 1, 0]

    ``births`` lists the distinct birth steps in ascending order, and ``birth_L`` has the index into
    it of each live entry. ``birth_L`` is None if all live entries share one birth step, which is
    the usual case.

    Args:
        live_N: mask of live entries, bool. The three tensors below also have one value for each
            entry of the chunk; their values of dead entries are ignored.
        exp_avg_N: first moment, fp32.
        exp_avg_sq_N: second moment, fp32.
        born_N: birth steps, int32: number of steps that were done when an entry became live.
        eight_bit: True to store moments in 8 bits, False for fp32.
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
        births_K = born_L.bincount().nonzero().flatten().int()  # Tensor.unique would sort all L
        assert len(births_K) <= 2**15, "birth_L is int16"
        self.births: list[int] = births_K.tolist()
        self.birth_L: Tensor | None = None
        if len(births_K) > 1:
            self.birth_L = torch.searchsorted(births_K, born_L, out_int32=True).to(torch.int16)

    def live(self) -> Tensor:
        """Return the mask of live entries, bool, one value for each entry of the chunk."""
        return unpack_bits(self.bits, self.size)

    def where(self) -> Tensor | None:
        """Return the index in the chunk of each live entry, int64; None if all are live."""
        return None if self.count == self.size else self.live().nonzero().flatten()

    def spread(self, values_L: Tensor) -> Tensor:
        """Expand values of live entries to the whole chunk, with zero for dead entries.

        Args:
            values_L: one value per live entry.

        Returns:
            One value for each entry of the chunk, in the dtype of ``values_L``; always a copy.
        """
        if self.count == self.size:  # takes a tenth of the time of the general case
            return values_L.clone()
        out_N = torch.zeros(self.size, dtype=values_L.dtype, device=values_L.device)
        out_N[self.live()] = values_L
        return out_N

    def born(self) -> Tensor:
        """Return the birth step of each entry of the chunk, int32, zero for dead entries."""
        births_K = torch.tensor(self.births, dtype=torch.int32, device=self.bits.device)
        born_L = births_K.expand(self.count) if self.birth_L is None else self._by_birth(births_K)
        return self.spread(born_L)

    def per_entry(self, values_K: Sequence[float]) -> float | Tensor:
        """Expand values given per birth step to one value per live entry.

        Args:
            values_K: one value for each birth step, in the order of ``births``.

        Returns:
            One value per live entry, fp32 [L]; a float if all birth steps have the same value.
        """
        if len(set(values_K)) == 1:
            return values_K[0]
        return self._by_birth(torch.tensor(values_K, dtype=torch.float32, device=self.bits.device))

    def nbytes(self) -> int:
        """Return the size of the state in bytes."""
        tensors = [self.bits, *self.exp_avg.tensors, *self.exp_avg_sq.tensors]
        if self.birth_L is not None:
            tensors.append(self.birth_L)
        return sum(t.untyped_storage().nbytes() for t in tensors)

    def _by_birth(self, values_K: Tensor) -> Tensor:
        assert self.birth_L is not None
        return values_K[self.birth_L.int()]
