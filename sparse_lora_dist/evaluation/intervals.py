"""95% confidence intervals in closed form, so that every machine computes the same numbers."""

import math
from collections.abc import Sequence

Z95 = 1.959963984540054
"""97.5% quantile of the standard normal distribution."""
Interval = tuple[float, float] | None
"""(lower end, upper end), or None if there are too few examples."""


def wilson(successes: float, count: int) -> Interval:
    """Interval of a share, successes / count: Wilson's score interval.

    It lies inside [0, 1], and is also valid for shares of 0 and 1.
    """
    share, z2 = successes / count, Z95**2
    centre = share + z2 / (2 * count)
    half = Z95 * math.sqrt(share * (1 - share) / count + z2 / (4 * count**2))
    low, high = (centre - half) / (1 + z2 / count), (centre + half) / (1 + z2 / count)
    return max(0.0, low), min(1.0, high)  # rounding may leave [0, 1]


def paired(ours: Sequence[float], theirs: Sequence[float]) -> Interval:
    """Interval of the difference of two shares over the same examples: adjusted Wald.

    Half an example is added to each cell of the 2 x 2 table, so that the interval has a width
    even if the two never disagree. A. Agresti and Y. Min, Statistics in Medicine 24 (2005), 729.

    Args:
        ours: 1.0 for a right, 0.0 for a wrong answer, per example.
        theirs: Results of the other model on the same examples.
    """
    gained = 0.5 + sum(a > b for a, b in zip(ours, theirs, strict=True))
    lost = 0.5 + sum(a < b for a, b in zip(ours, theirs, strict=True))
    n = len(ours) + 2
    middle = (gained - lost) / n
    half = Z95 * math.sqrt(gained + lost - n * middle**2) / n
    return max(-1.0, middle - half), min(1.0, middle + half)


def ratio(sums: Sequence[float], weights: Sequence[float]) -> Interval:
    """Interval of r = sum(sums) / sum(weights), for examples drawn independently.

    Normal approximation of a ratio estimator (linearised): its variance is
    n / (n - 1) * sum((s - r w)^2) / sum(w)^2. With weights of 1 this is the squared standard error
    of a mean.
    """
    n, total = len(sums), math.fsum(weights)
    if n < 2:
        return None
    mean = math.fsum(sums) / total
    squares = math.fsum((s - mean * w) ** 2 for s, w in zip(sums, weights, strict=True))
    half = Z95 * math.sqrt(n / (n - 1) * squares) / total
    return mean - half, mean + half
