"""What a run adds to the weight of one linear, some rows at a time.

Shapes: O out_features, I in_features, L live components.
"""

from dataclasses import dataclass
from math import sqrt
from typing import Protocol

import torch
from torch import Tensor

from sparse_lora_dist.adapter.linear import AdapterLinear
from sparse_lora_dist.methods.protocol.form import Tensors

COLUMNS = 1024
"""Of a change that is found by asking what its delta makes of the identity."""


class Change(Protocol):
    """In fp32, its scale included."""

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I)"""

    def rows(self, start: int, stop: int) -> Tensor:
        """[stop - start, I]"""

    @property
    def at_most(self) -> int:
        """Weights that it can change at most."""

    @property
    def norm(self) -> float:
        """Frobenius."""


@dataclass(frozen=True, kw_only=True)
class LowRank:
    """scale * B A"""

    a_LI: Tensor
    b_OL: Tensor
    scale: float

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.b_OL), self.a_LI.shape[1]

    def rows(self, start: int, stop: int) -> Tensor:
        return self.b_OL[start:stop] @ self.a_LI * self.scale

    @property
    def at_most(self) -> int:
        """Of each component the outer product of what lives in its row of A and its column of B,
        no two of them in one place: the bound of RoseLoRA's Proposition 1 (arXiv:2406.10777)."""
        together = ((self.a_LI != 0).sum(1) * (self.b_OL != 0).sum(0)).sum()
        return min(int(together), self.a_LI.shape[1] * len(self.b_OL))

    @property
    def norm(self) -> float:
        """Without the O x I product: the sum of (B^T B) * (A A^T) is its square."""
        a_LI, b_OL = self.a_LI.double(), self.b_OL.double()
        square = float(((b_OL.t() @ b_OL) * (a_LI @ a_LI.t())).sum())
        return abs(self.scale) * sqrt(max(square, 0.0))  # in this order: NaN stays


@dataclass(frozen=True, kw_only=True)
class Dense:
    """As it is, of a form that is no low-rank pair."""

    change_OI: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.change_OI.shape[0], self.change_OI.shape[1]

    def rows(self, start: int, stop: int) -> Tensor:
        return self.change_OI[start:stop]

    @property
    def at_most(self) -> int:
        return int(self.change_OI.count_nonzero())

    @property
    def norm(self) -> float:
        return float(self.change_OI.double().norm())


def dense_change(adapter: AdapterLinear, tensors: Tensors) -> Dense:
    """What the delta, which is linear in its input, makes of the identity."""
    site = adapter.site
    change_OI = torch.empty(site.out_features, site.in_features)
    for start in range(0, site.in_features, COLUMNS):
        count = min(COLUMNS, site.in_features - start)
        x_TI = torch.zeros(count, site.in_features)
        x_TI.diagonal(start).fill_(1.0)
        change_OI[:, start : start + count] = adapter.form.delta(x_TI, tensors, adapter.scale).t()
    return Dense(change_OI=change_OI)
