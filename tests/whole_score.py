"""The reference of ``methods.base.Score``: one process, the whole tensor, sorting and adding."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_lora_dist.methods.base import By


@dataclass(frozen=True)
class WholeScore:
    """Importance of a tensor that lies here whole."""

    values: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.values.shape)

    def top_k(self, k: int, by: By) -> Tensor:
        segments = self._segments(by)
        mask = torch.zeros(self.values.numel(), dtype=torch.bool)
        for segment in segments.unique():
            (index,) = torch.where(segments == segment)
            order = torch.argsort(self.values.flatten()[index], descending=True, stable=True)
            mask[index[order[:k]]] = True
        return mask

    def sums(self, by: By) -> Tensor:
        segments = self._segments(by)
        sums = torch.zeros(int(segments.max()) + 1, dtype=torch.float64)
        return sums.index_add_(0, segments, self.values.flatten().double())

    def spread(self, values: Tensor, by: By) -> Tensor:
        return values[self._segments(by)]

    def _segments(self, by: By) -> Tensor:
        rows = self.values.reshape(self.values.shape[0], -1)
        index = torch.arange(rows.numel())
        if by == "row":
            return index // rows.shape[1]
        return index % rows.shape[1] if by == "column" else torch.zeros_like(index)
