"""Computes delta W, the update that an adapter adds to one weight, a few rows at a time.

Shapes: O out_features, I in_features, L number of rank-1 components with a nonzero update.
"""

from dataclasses import dataclass
from math import sqrt
from typing import Protocol

import torch
from torch import Tensor

from sparse_lora_dist.adapter.linear import AdapterLinear
from sparse_lora_dist.methods.protocol.form import Tensors

COLUMNS = 1024
"""Number of columns of a dense delta W that ``dense_change`` computes at a time."""


class WeightChange(Protocol):
    """The update of one weight, in fp32, with the adapter's scale included."""

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features), the shape of the weight."""

    def rows(self, start: int, stop: int) -> Tensor:
        """Return some rows of the update.

        Args:
            start: Index of the first row.
            stop: Index after the last row. As with slices, it may exceed the number of rows.

        Returns:
            The rows, [number of rows, in_features], fp32.
        """

    @property
    def max_changed(self) -> int:
        """Upper bound on the number of nonzero entries of the update."""

    @property
    def norm(self) -> float:
        """Frobenius norm of the update."""


@dataclass(frozen=True, kw_only=True)
class LowRank:
    """A ``WeightChange`` that is stored as factors: delta W = scale * B A."""

    a_LI: Tensor
    """A, [number of components, in_features]."""
    b_OL: Tensor
    """B, [out_features, number of components]."""
    scale: float
    """Factor of B A, e.g. alpha / rank."""

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.b_OL), self.a_LI.shape[1]

    def rows(self, start: int, stop: int) -> Tensor:
        return self.b_OL[start:stop] @ self.a_LI * self.scale

    @property
    def max_changed(self) -> int:
        """Upper bound on the number of nonzero entries (RoseLoRA, arXiv:2406.10777, Proposition 1).

        A component changes at most (nonzeros in its row of A) * (nonzeros in its column of B)
        entries. The bound is reached if no two components change the same entry.
        """
        total = ((self.a_LI != 0).sum(1) * (self.b_OL != 0).sum(0)).sum()
        return min(int(total), self.a_LI.shape[1] * len(self.b_OL))

    @property
    def norm(self) -> float:
        """Frobenius norm, without computing B A: ||B A||^2 is the sum of (B^T B) * (A A^T)."""
        a_LI, b_OL = self.a_LI.double(), self.b_OL.double()
        square = float(((b_OL.t() @ b_OL) * (a_LI @ a_LI.t())).sum())
        return abs(self.scale) * sqrt(max(square, 0.0))  # unlike max(0.0, square), it keeps NaN


@dataclass(frozen=True, kw_only=True)
class DenseChange:
    """A ``WeightChange`` that is stored as a dense matrix, for updates that are not low-rank."""

    change_OI: Tensor
    """delta W, [out_features, in_features], fp32, with the adapter's scale included."""

    @property
    def shape(self) -> tuple[int, int]:
        return self.change_OI.shape[0], self.change_OI.shape[1]

    def rows(self, start: int, stop: int) -> Tensor:
        return self.change_OI[start:stop]

    @property
    def max_changed(self) -> int:
        return int(self.change_OI.count_nonzero())

    @property
    def norm(self) -> float:
        return float(self.change_OI.double().norm())


def dense_change(adapter: AdapterLinear, tensors: Tensors) -> DenseChange:
    """Compute the update of one linear as a dense matrix, for methods whose update is not a LoRA.

    What the adapter adds to its linear's output is linear in the input, so the outputs for the rows
    of the identity matrix are the columns of delta W.

    Args:
        adapter: The adapter of the linear.
        tensors: The tensors that forward computes with, by name (``adapter.computed``).

    Returns:
        The update; its ``change_OI`` is delta W, [out_features, in_features], fp32, on the CPU.
    """
    site = adapter.site
    change_OI = torch.empty(site.out_features, site.in_features)
    for start in range(0, site.in_features, COLUMNS):
        count = min(COLUMNS, site.in_features - start)
        x_TI = torch.zeros(count, site.in_features)
        x_TI.diagonal(start).fill_(1.0)
        change_OI[:, start : start + count] = adapter.form.delta(x_TI, tensors, adapter.scale).t()
    return DenseChange(change_OI=change_OI)
