"""Random numbers made by hashing indices with a seed.

Hashing uses integers only, so all devices give the same bits; torch's generators do not. It is
cheap enough to repeat at every use, so the numbers need not be stored.

Shapes: N numbers.
"""

from math import prod

import torch
from torch import Tensor

GOLDEN = -7046029254386353131
"""Increment of splitmix64: 2^64 / golden ratio, odd, as a signed number."""
MULTIPLIERS = ((30, -4658895280553007687), (27, -7723592293110705685))
"""Rounds of splitmix64 (S. Vigna, prng.di.unimi.it): (number of bits to shift by, multiplier) of
each."""


def hashes(count: int, seed: int, device: torch.device) -> Tensor:
    """Return ``count`` different pseudo-random numbers: the hashes of 0 ... count - 1.

    The hash is splitmix64, in integer arithmetic, so that every device gives the same bits.

    Args:
        count: Number of hashes.
        seed: Seed; other seeds give other numbers.
        device: Device of the result.

    Returns:
        The hashes, int64 [count]; any int64 may occur.
    """
    x_N = torch.arange(1, count + 1, device=device) * GOLDEN + seed
    for shift, multiplier in MULTIPLIERS:
        x_N = (x_N ^ _shifted(x_N, shift)) * multiplier
    return x_N ^ _shifted(x_N, 31)


def _shifted(x_N: Tensor, bits: int) -> Tensor:
    """Shift right and fill with zeros; torch's >> fills with ones for negative numbers."""
    return (x_N >> bits) & ((1 << (64 - bits)) - 1)


def uniform(shape: tuple[int, ...], bound: float, seed: int, device: torch.device) -> Tensor:
    """Return random numbers from U(-bound, bound), with 24 random bits each.

    Args:
        shape: Shape of the result.
        bound: Half the width of the interval.
        seed: Seed of the numbers.
        device: Device of the result.

    Returns:
        The numbers, fp32 of ``shape``, the same bits on every device.
    """
    units_N = _shifted(hashes(prod(shape), seed, device), 40).float() * 2.0**-23 - 1.0
    return (units_N * bound).view(shape)


def distinct(count: int, below: int, seed: int, device: torch.device) -> Tensor:
    """Draw ``count`` different whole numbers from 0 ... below - 1.

    Args:
        count: Number of numbers to draw, at most ``below``.
        below: Upper end of the range, not included.
        seed: Seed of the draw.
        device: Device of the result.

    Returns:
        The numbers, ascending, int64 [count].
    """
    return hashes(below, seed, device).argsort()[:count].sort().values


def stratified(count: int, below: int, seed: int, device: torch.device) -> Tensor:
    """Draw one whole number from each of ``count`` equal parts of the range 0 ... below - 1.

    For count 3 and below 9 the parts are 0-2, 3-5 and 6-8. This needs no sort, so it is faster than
    ``distinct``. Use it where the numbers need only be spread over the whole range.

    Args:
        count: Number of parts, at most ``below``.
        below: Upper end of the range, not included.
        seed: Seed of the draw.
        device: Device of the result.

    Returns:
        The numbers, ascending, int64 [count].
    """
    edges = torch.arange(count + 1, device=device) * below // count
    widths_N = edges.diff()
    return edges[:-1] + _shifted(hashes(count, seed, device), 1) % widths_N
