"""Masks packed as one bit an entry.

    True False False True  True False False False  True   ->   bytes 0b00011001, 0b00000001

Shapes: O out_features, I in_features, B = ceil(O I / 8) bytes, N entries.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_lora_dist.methods.protocol.form import KeptSpec, Site


def mask_spec(site: Site) -> KeptSpec:
    """Return the spec of a kept tensor that holds a mask of the site's weight with one bit per
    entry.

    All bits are 0 until the method writes the mask.
    """
    return KeptSpec(shape=(-(-site.out_features * site.in_features // 8),), dtype=torch.uint8)


def pack(mask_OI: Tensor) -> Tensor:
    """Pack a mask of a weight, bool [O, I], into bytes, uint8 [ceil(O I / 8)].

    The first entry is the lowest bit of the first byte.
    """
    return pack_bits(mask_OI.flatten())


def unpack(bits_B: Tensor, shape: tuple[int, int]) -> Tensor:
    """Unpack bytes from ``pack`` into a mask, bool of ``shape`` (out_features, in_features)."""
    return unpack_bits(bits_B, shape[0] * shape[1]).view(shape)


def pack_bits(mask_N: Tensor) -> Tensor:
    """Pack bool [N] into uint8 [ceil(N / 8)]. The first entry is the lowest bit of the first
    byte."""
    eights = F.pad(mask_N, (0, -len(mask_N) % 8)).view(-(-len(mask_N) // 8), 8)
    return (eights * _powers(mask_N.device)).sum(1, dtype=torch.uint8)


def unpack_bits(bits: Tensor, size: int) -> Tensor:
    """Unpack bytes from ``pack_bits``, uint8 [ceil(size / 8)], into bool [size]."""
    return (bits[:, None] & _powers(bits.device)).flatten()[:size].bool()


def _powers(device: torch.device) -> Tensor:
    return 2 ** torch.arange(8, dtype=torch.uint8, device=device)
