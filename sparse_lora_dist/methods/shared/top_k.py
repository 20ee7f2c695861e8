"""Selection of the largest entries of a whole tensor, the same on every device; places of a mask.

Shapes: N entries.
"""

from collections.abc import Mapping
from itertools import islice

import torch
from torch import Tensor


def k_largest(scores: Tensor, k: int) -> Tensor:
    """Select the ``k`` largest scores; of equal scores, those of the lowest index are taken first.

    torch.topk does not say which of several equal scores it takes, and an NF4 weight has many equal
    entries, so two devices could choose differently. Example: for the scores 1 3 2 2 and k = 2 the
    k-th largest score is 2 and the mask is 0 1 1 0.

    Args:
        scores: Scores, of any shape; they are compared over the whole tensor.
        k: Number of scores to select. 0 or less selects none, the number of scores or more selects
            all.

    Returns:
        The mask, bool in the shape of ``scores``; True means selected.

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
    # Not kthvalue: on a GPU it gives a whole weight to one block of threads.
    threshold = scores_N.topk(k, sorted=False).values.min()
    mask_N, tied_N = scores_N > threshold, scores_N == threshold
    mask_N |= tied_N & (tied_N.cumsum(0, dtype=torch.int32) <= k - mask_N.sum())
    return mask_N.view(scores.shape)


def places_of(masks: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Return where each of several masks is True. The host waits once for all of them.

    Args:
        masks: Name -> mask, bool, 1-D, all on one device.

    Returns:
        Name -> ascending indices.
    """
    flags = iter(torch.cat([*masks.values()]).tolist()) if masks else iter(())
    return {
        name: tuple(i for i, flag in enumerate(islice(flags, len(mask))) if flag)
        for name, mask in masks.items()
    }
