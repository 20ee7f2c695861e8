"""Computes 95% confidence intervals over the examples of an evaluation.

They are in closed form, without random resampling, so that all machines get the same numbers.
"""

import math
from collections.abc import Sequence

Z95 = 1.959963984540054
"""97.5% quantile of the standard normal distribution."""
Interval = tuple[float, float] | None
"""(lower end, upper end) of a 95% confidence interval, or None if there are too few examples."""


def wilson(successes: float, count: int) -> Interval:
    """Return Wilson's 95% score interval of a share, e.g. of a model's accuracy.

    It lies inside [0, 1], and is also valid for shares of 0 and 1.

    Args:
        successes: Number of right examples.
        count: Number of all examples, at least 1.

    Returns:
        (lower end, upper end), as shares in [0, 1].
    """
    share, z2 = successes / count, Z95**2
    centre = share + z2 / (2 * count)
    half = Z95 * math.sqrt(share * (1 - share) / count + z2 / (4 * count**2))
    low, high = (centre - half) / (1 + z2 / count), (centre + half) / (1 + z2 / count)
    return max(0.0, low), min(1.0, high)  # rounding may leave [0, 1]


def paired(ours: Sequence[float], theirs: Sequence[float]) -> Interval:
    """Return the 95% interval of the difference between two models' accuracies.

    Both are measured on the same examples. It is the adjusted Wald interval for paired data of
    A. Agresti and Y. Min, Statistics in Medicine 24 (2005), 729. It starts from four counts of
    examples: both models right, only the first, only the second, or none. Half an example is added
    to each count, so that the interval has a width even if the models never disagree.

    Args:
        ours: Per example: 1.0 if the first model is right, 0.0 if it is wrong.
        theirs: Per example, in the same order: 1.0 if the second model is right, 0.0 if it is
            wrong. Its accuracy is subtracted from the first model's.

    Returns:
        (lower end, upper end) of the difference, in [-1, 1].
    """
    gained = 0.5 + sum(a > b for a, b in zip(ours, theirs, strict=True))
    lost = 0.5 + sum(a < b for a, b in zip(ours, theirs, strict=True))
    n = len(ours) + 2
    middle = (gained - lost) / n
    half = Z95 * math.sqrt(gained + lost - n * middle**2) / n
    return max(-1.0, middle - half), min(1.0, middle + half)


def ratio(sums: Sequence[float], weights: Sequence[float]) -> Interval:
    """Return the 95% interval of r = sum(sums) / sum(weights), for examples drawn independently.

    It is the normal approximation of a linearised ratio estimator with the variance
    n / (n - 1) * sum((s - r w)^2) / sum(w)^2, where n is the number of examples, and s and w are
    their entries of ``sums`` and ``weights``. With weights of 1 this is the squared standard error
    of a mean.

    Args:
        sums: Per example: e.g. its loss in nats, summed over its tokens.
        weights: Per example: e.g. its number of tokens; positive in total.

    Returns:
        (lower end, upper end), in the unit of r; None for fewer than two examples.
    """
    n, total = len(sums), math.fsum(weights)
    if n < 2:
        return None
    mean = math.fsum(sums) / total
    squares = math.fsum((s - mean * w) ** 2 for s, w in zip(sums, weights, strict=True))
    half = Z95 * math.sqrt(n / (n - 1) * squares) / total
    return mean - half, mean + half
