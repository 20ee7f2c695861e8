"""Masks of a weight, a bit an entry: what a method keeps of where a weight lives.

Shapes: O out_features, I in_features, B = ceil(O I / 8) bytes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_lora_dist.methods.protocol.form import KeptSpec, Site


def mask_spec(site: Site) -> KeptSpec:
    """Of a mask of the site's weight, packed: no bit is set until it is written."""
    return KeptSpec(shape=(-(-site.out_features * site.in_features // 8),), dtype=torch.uint8)


def pack(mask_OI: Tensor) -> Tensor:
    """bool [O, I] -> uint8 [B], the first entry in the lowest bit of the first byte."""
    flat = mask_OI.flatten()
    eights = F.pad(flat, (0, -len(flat) % 8)).view(-1, 8)
    return (eights * _powers(flat.device)).sum(1, dtype=torch.uint8)


def unpack(bits_B: Tensor, shape: tuple[int, int]) -> Tensor:
    """The mask that was packed: bool [O, I], ``shape``."""
    spread = bits_B[:, None] & _powers(bits_B.device)
    return spread.flatten()[: shape[0] * shape[1]].bool().view(shape)


def _powers(device: torch.device) -> Tensor:
    return 2 ** torch.arange(8, dtype=torch.uint8, device=device)
