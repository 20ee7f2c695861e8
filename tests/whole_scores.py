"""The reference of ``methods.base.Scores``: one process, whole tensors, sorting and adding."""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from sparse_lora_dist.methods.protocol.method import By


class WholeScores:
    """Importance of tensors that lie here whole. Without ``live`` everything lives."""

    def __init__(
        self,
        values: Mapping[str, Tensor],
        live: Mapping[str, Tensor] | None = None,
        site_stats: Tensor | None = None,
    ) -> None:
        self.values = values
        self.live_masks = live or {n: torch.ones_like(t).bool() for n, t in values.items()}
        self.site_stats = torch.zeros(0, 0).double() if site_stats is None else site_stats

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: tuple(values.shape) for name, values in self.values.items()}

    def top_k(
        self, k: Mapping[str, int], by: Mapping[str, By], ties: Literal["index", "all"] = "index"
    ) -> dict[str, Tensor]:
        masks = {}
        for name in sorted(k):
            lines = in_lines(self._finite(name), by[name])
            if not 1 <= k[name] <= lines.shape[1]:
                raise ValueError(f"{name}: k must be in [1, {lines.shape[1]}], got {k[name]}")
            order = torch.argsort(lines, dim=1, descending=True, stable=True)
            chosen = torch.zeros_like(lines).bool().scatter(1, order[:, : k[name]], True)
            if ties == "all":
                chosen = lines >= lines.gather(1, order[:, k[name] - 1, None])
            masks[name] = (chosen.t() if by[name] == "column" else chosen).flatten()
        return masks

    def sums(self, by: Mapping[str, By]) -> dict[str, Tensor]:
        return {n: in_lines(self._finite(n), by[n]).double().sum(1) for n in sorted(by)}

    def live(self, by: Mapping[str, By]) -> dict[str, Tensor]:
        return {n: in_lines(self.live_masks[n], by[n]).long().sum(1) for n in sorted(by)}

    def spread(self, name: str, values: Tensor, by: By) -> Tensor:
        lines = values[:, None].expand_as(in_lines(self.values[name], by))
        return (lines.t() if by == "column" else lines).flatten()

    def _finite(self, name: str) -> Tensor:
        if not torch.isfinite(self.values[name]).all():
            raise FloatingPointError(f"importance scores of {name} hold NaN or infinity")
        return self.values[name]


def in_lines(t: Tensor, by: By) -> Tensor:
    """The tensor as a matrix that has a segment in each row."""
    if by == "tensor":
        return t.reshape(1, -1)
    matrix = t.reshape(t.shape[0], -1)
    return matrix if by == "row" else matrix.t()
