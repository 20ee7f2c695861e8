"""95% confidence intervals, in closed form: the same numbers wherever they are made."""

import math
from collections.abc import Sequence

Z95 = 1.959963984540054
"""Of the normal distribution, two-sided."""
Interval = tuple[float, float] | None
"""Lower and upper end; None where there are too few examples for one."""


def wilson(successes: float, count: int) -> Interval:
    """Of a share: Wilson's score interval, which stays inside [0, 1] and holds at its ends too."""
    share, z2 = successes / count, Z95**2
    centre = share + z2 / (2 * count)
    half = Z95 * math.sqrt(share * (1 - share) / count + z2 / (4 * count**2))
    low, high = (centre - half) / (1 + z2 / count), (centre + half) / (1 + z2 / count)
    return max(0.0, low), min(1.0, high)  # but for rounding they are inside


def paired(ours: Sequence[float], theirs: Sequence[float]) -> Interval:
    """Of the difference of two shares over the same examples: Wald's, half an example added to
    each of the four cells, so that no disagreement is not certainty.

    A. Agresti and Y. Min, Statistics in Medicine 24 (2005), 729.
    """
    gained = 0.5 + sum(a > b for a, b in zip(ours, theirs, strict=True))
    lost = 0.5 + sum(a < b for a, b in zip(ours, theirs, strict=True))
    n = len(ours) + 2
    middle = (gained - lost) / n
    half = Z95 * math.sqrt(gained + lost - n * middle**2) / n
    return max(-1.0, middle - half), min(1.0, middle + half)


def ratio(sums: Sequence[float], weights: Sequence[float]) -> Interval:
    """Of sum(sums) / sum(weights), normal, the examples taken as independent draws.

    The ratio of two means, linearised: its variance is n / (n - 1) * sum((s - r w)^2) / sum(w)^2.
    With weights of 1 that is the usual standard error of a mean.
    """
    n, total = len(sums), math.fsum(weights)
    if n < 2:
        return None
    mean = math.fsum(sums) / total
    squares = math.fsum((s - mean * w) ** 2 for s, w in zip(sums, weights, strict=True))
    half = Z95 * math.sqrt(n / (n - 1) * squares) / total
    return mean - half, mean + half
