"""Random numbers made by hashing indices with a seed.

Hashing uses integers only, so all devices give the same bits, which torch's generators do not. It
is cheap enough to repeat at every use, so the numbers need not be stored.

Shapes: N numbers.
"""

from math import prod

import torch
from torch import Tensor

GOLDEN = -7046029254386353131
"""Increment of splitmix64: 2^64 / golden ratio, odd, as a signed number."""
MULTIPLIERS = ((30, -4658895280553007687), (27, -7723592293110705685))
"""Rounds of splitmix64 (S. Vigna, prng.di.unimi.it): bits to shift by, multiplier."""


def hashes(count: int, seed: int, device: torch.device) -> Tensor:
    """Return splitmix64 of indices 0 ... N - 1, int64 [N], all different."""
    x_N = torch.arange(1, count + 1, device=device) * GOLDEN + seed
    for shift, multiplier in MULTIPLIERS:
        x_N = (x_N ^ _shifted(x_N, shift)) * multiplier
    return x_N ^ _shifted(x_N, 31)


def _shifted(x_N: Tensor, bits: int) -> Tensor:
    """Shift right and fill with zeros; torch's >> fills with the sign."""
    return (x_N >> bits) & ((1 << (64 - bits)) - 1)


def uniform(shape: tuple[int, ...], bound: float, seed: int, device: torch.device) -> Tensor:
    """Return U(-bound, bound) with 24 random bits each, fp32 of ``shape``."""
    units_N = _shifted(hashes(prod(shape), seed, device), 40).float() * 2.0**-23 - 1.0
    return (units_N * bound).view(shape)


def distinct(count: int, below: int, seed: int, device: torch.device) -> Tensor:
    """Return ``count`` different random numbers below ``below``, ascending, int64 [count]."""
    return hashes(below, seed, device).argsort()[:count].sort().values


def stratified(count: int, below: int, seed: int, device: torch.device) -> Tensor:
    """Return one random number from each of ``count`` equal parts of 0 ... below - 1, ascending,
    int64 [count].

    It needs no sort, unlike ``distinct``, and serves where the numbers only must lie everywhere.
    For count 3 and below 9 the parts are 0-2, 3-5 and 6-8.
    """
    edges = torch.arange(count + 1, device=device) * below // count
    widths_N = edges.diff()
    return edges[:-1] + _shifted(hashes(count, seed, device), 1) % widths_N
