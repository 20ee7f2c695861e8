"""Tensors that a method writes and no gradient trains, held as bytes of a parameter."""

import torch
from torch import Tensor

from sparse_lora_dist.methods.protocol.form import KeptSpec


def from_bytes(parameter: Tensor, spec: KeptSpec) -> Tensor:
    """From the bytes that are gathered. A copy, but of single bytes: the view of wider entries
    must not begin anywhere."""
    raw = parameter.data.view(torch.uint8)[: spec.num_bytes]
    return (raw if spec.dtype.itemsize == 1 else raw.clone()).view(spec.dtype).view(spec.shape)
