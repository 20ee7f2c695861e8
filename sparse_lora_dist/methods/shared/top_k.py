"""Which entries of a whole tensor are the largest: the same ones on every device.

Shapes: N entries.
"""

import torch
from torch import Tensor


def k_largest(scores: Tensor, k: int) -> Tensor:
    """The mask of the ``k`` largest of all entries, in the scores' shape; what equals the k-th:
    those of lowest index up to k. NF4 has so many equal weights that torch.topk, which promises
    nothing of ties, would choose otherwise on another device.

    Raises:
        FloatingPointError: a score is NaN.
    """
    scores_N = scores.flatten()
    if scores_N.isnan().any():
        raise FloatingPointError(
            "importance scores contain NaN: lower --learning_rate, or check the base weights"
        )
    if not 0 < k < len(scores_N):
        return torch.full_like(scores, k > 0, dtype=torch.bool)
    threshold = scores_N.kthvalue(len(scores_N) - k + 1).values
    mask_N = scores_N > threshold
    (tied,) = (scores_N == threshold).nonzero(as_tuple=True)
    mask_N[tied[: k - int(mask_N.sum())]] = True
    return mask_N.view(scores.shape)
