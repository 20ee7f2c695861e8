"""Numbers from a seed by hashing their places: in integers, so the same bits on every device, and
cheap enough to be made anew at every use.

Shapes: N numbers.
"""

from math import prod

import torch
from torch import Tensor

GOLDEN = -7046029254386353131
"""2^64 / the golden ratio, odd, as a signed number: splitmix64's step."""
MULTIPLIERS = ((30, -4658895280553007687), (27, -7723592293110705685))
"""splitmix64's (S. Vigna, prng.di.unimi.it): shift, then multiply by."""


def hashes(count: int, seed: int, device: torch.device) -> Tensor:
    """splitmix64 of the first N places, int64 [N]; different places have different hashes."""
    x_N = torch.arange(1, count + 1, device=device) * GOLDEN + seed
    for shift, multiplier in MULTIPLIERS:
        x_N = (x_N ^ _shifted(x_N, shift)) * multiplier
    return x_N ^ _shifted(x_N, 31)


def _shifted(x_N: Tensor, bits: int) -> Tensor:
    """To the right, zeros following: torch's own fills up with the sign."""
    return (x_N >> bits) & ((1 << (64 - bits)) - 1)


def uniform(shape: tuple[int, ...], bound: float, seed: int, device: torch.device) -> Tensor:
    """U(-bound, bound) in 24 bits, fp32."""
    units_N = _shifted(hashes(prod(shape), seed, device), 40).float() * 2.0**-23 - 1.0
    return (units_N * bound).view(shape)


def distinct(count: int, below: int, seed: int, device: torch.device) -> Tensor:
    """``count`` different numbers below ``below``, drawn without order, ascending, int64."""
    return hashes(below, seed, device).argsort()[:count].sort().values


def stratified(count: int, below: int, seed: int, device: torch.device) -> Tensor:
    """A number of each of ``count`` equal parts of what is below ``below``, ascending, int64: as
    good as drawn at random where all that matters is that they lie everywhere, and there is nothing
    to sort."""
    edges = torch.arange(count + 1, device=device) * below // count
    widths_N = edges.diff()
    return edges[:-1] + _shifted(hashes(count, seed, device), 1) % widths_N
