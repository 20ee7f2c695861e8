"""Read kept tensors, which a method writes and no gradient trains, from the bytes of a parameter.

Examples are masks and indices. ZeRO-3 shards parameters in one dtype, that of the DeepSpeed engine
(bf16, fp16 or fp32). So the bytes of a kept tensor of any dtype are stored in a parameter of the
engine's dtype, padded with zeros to a whole number of its elements. With a bf16 engine, a uint8
mask of 5 bytes takes 3 elements:

    bytes of the mask    b0 b1 | b2 b3 | b4 0
    bf16 elements          e0  |   e1  |  e2

The parameter is only gathered and cut, never computed with: its elements mean nothing as numbers,
and some are NaN.
"""

import torch
from torch import Tensor

from sparse_lora_dist.methods.protocol.form import KeptSpec


def from_bytes(parameter: Tensor, spec: KeptSpec) -> Tensor:
    """Return the kept tensor whose bytes a gathered parameter holds.

    Args:
        parameter: gathered parameter, 1-D, in the dtype of the DeepSpeed engine.
        spec: shape and dtype of the kept tensor.

    Returns:
        Tensor of ``spec.shape`` and ``spec.dtype``. If its entries are single bytes, it is a view
        of ``parameter``, otherwise a copy.
    """
    # A view as a wider dtype needs an aligned start, which the gathered buffer does not promise.
    raw = parameter.data.view(torch.uint8)[: spec.num_bytes]
    return (raw if spec.dtype.itemsize == 1 else raw.clone()).view(spec.dtype).view(spec.shape)
