"""Selection of the largest entries of a whole tensor, the same on every device.

Shapes: N entries.
"""

import torch
from torch import Tensor


def k_largest(scores: Tensor, k: int) -> Tensor:
    """Return the mask of the ``k`` largest scores, bool of the scores' shape; ties: lowest index.

    torch.topk does not say which of several equal scores it takes, and an NF4 weight has many equal
    entries, so two devices could choose differently. Example: for the scores 1 3 2 2 and k = 2 the
    threshold is 2 and the mask 0 1 1 0.

    Raises:
        FloatingPointError: A score is NaN.
    """
    scores_N = scores.flatten()
    if scores_N.isnan().any():
        raise FloatingPointError(
            "importance scores contain NaN. Lower --learning_rate, or check the base weights"
        )
    if not 0 < k < len(scores_N):
        return torch.full_like(scores, k > 0, dtype=torch.bool)
    threshold = scores_N.kthvalue(len(scores_N) - k + 1).values
    mask_N = scores_N > threshold
    (tied,) = (scores_N == threshold).nonzero(as_tuple=True)
    mask_N[tied[: k - int(mask_N.sum())]] = True
    return mask_N.view(scores.shape)
