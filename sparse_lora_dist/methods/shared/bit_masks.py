"""Masks stored as packed bits, one bit per entry, eight entries in a byte.

    True False False True  True False False False  True   ->   bytes 0b00011001, 0b00000001

Shapes: O out_features, I in_features, B = ceil(O I / 8) bytes, N entries.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_lora_dist.methods.protocol.form import KeptSpec, Site


def mask_spec(site: Site) -> KeptSpec:
    """Return the spec of a kept tensor that stores a mask of the site's weight with one bit per
    entry.

    All bits are 0 until the method writes the mask.

    Returns:
        Spec of a uint8 tensor [ceil(out_features * in_features / 8)], in the format of ``pack``.
    """
    return KeptSpec(shape=(-(-site.out_features * site.in_features // 8),), dtype=torch.uint8)


def pack(mask_OI: Tensor) -> Tensor:
    """Pack a mask of a weight, bool [O, I], into bytes, uint8 [ceil(O I / 8)].

    The first entry is the lowest bit of the first byte.
    """
    return pack_bits(mask_OI.flatten())


def unpack(bits_B: Tensor, shape: tuple[int, int]) -> Tensor:
    """Unpack the mask of a weight from the bytes that ``pack`` returns.

    Args:
        bits_B: Packed bits, uint8 [ceil(out_features * in_features / 8)].
        shape: Shape of the weight, (out_features, in_features).

    Returns:
        The mask, bool [out_features, in_features].
    """
    return unpack_bits(bits_B, shape[0] * shape[1]).view(shape)


def pack_bits(mask_N: Tensor) -> Tensor:
    """Pack bool [N] into uint8 [ceil(N / 8)]. The first entry is the lowest bit of the first
    byte."""
    eights = F.pad(mask_N, (0, -len(mask_N) % 8)).view(-(-len(mask_N) // 8), 8)
    return (eights * _powers(mask_N.device)).sum(1, dtype=torch.uint8)


def unpack_bits(bits: Tensor, size: int) -> Tensor:
    """Unpack the bytes that ``pack_bits`` returns.

    Args:
        bits: Packed bits, uint8 [ceil(size / 8)].
        size: Number of entries that were packed.

    Returns:
        The entries, bool [size].
    """
    return (bits[:, None] & _powers(bits.device)).flatten()[:size].bool()


def _powers(device: torch.device) -> Tensor:
    return 2 ** torch.arange(8, dtype=torch.uint8, device=device)
