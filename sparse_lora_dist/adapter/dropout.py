"""Dropout masks of adapters that depend on no layout: which rows the model is looking at.

Shapes: M rows of a micro-batch, T tokens of a row, I in_features, L tokens of a full-length row.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from sparse_lora_dist.adapter.input_statistics import RowMetadata
from sparse_lora_dist.adapter.seeds import seed_of


@dataclass
class RowSeeds:
    """Which rows the model is looking at; all adapters of a model draw their dropout from one.

    A mask depends on (seed, step, row, site) alone, so neither the number of ranks nor the
    micro-batch size changes it.
    """

    seed: int
    sequence_length: int
    step: int = 0
    rows_M: tuple[int, ...] = field(default=())
    lengths_M: tuple[int, ...] = field(default=())
    """Tokens of each of them, at its front; what follows is padding."""
    num_positions: int | None = None
    """T of the micro-batch; None takes any input for one of its rows."""
    micro_batch: int = 0
    """How many there were."""

    def begin(
        self, rows_M: tuple[int, ...], lengths_M: tuple[int, ...], *, num_positions: int
    ) -> None:
        """The model looks at these rows from now on."""
        self.rows_M, self.lengths_M, self.num_positions = rows_M, lengths_M, num_positions
        self.micro_batch += 1

    def row_metadata(self) -> RowMetadata:
        """What of them outlives a forward."""
        return RowMetadata(
            rows_M=self.rows_M, lengths_M=self.lengths_M, num_positions=self.num_positions
        )

    def keep_mask(
        self, x: Tensor, site: str, rows_M: tuple[int, ...], step: int, dropout: float
    ) -> Tensor:
        """1 / (1 - dropout) where an entry of ``x`` stays and 0 where it is dropped.

        ``x`` is [M, T, I], [M * T, I], [M, I] where one token stands for each row, or of no row.
        """
        if x.dim() == 2 and len(x) == len(rows_M) * (self.num_positions or 0):
            x_MTI = x.view(len(rows_M), -1, x.shape[1])
            return self.keep_mask(x_MTI, site, rows_M, step, dropout).view_as(x)
        mask = torch.empty_like(x)
        if not self._is_of_rows(x, rows_M):
            generator = torch.Generator(x.device).manual_seed(seed_of(self.seed, step, site))
            return mask.bernoulli_(1.0 - dropout, generator=generator).div_(1.0 - dropout)
        # Drawn for a full-length row and cut: a row's mask must not depend on the padding after it.
        full_LI = x.new_empty(self.sequence_length, x.shape[-1])
        for m, row in enumerate(rows_M):
            generator = torch.Generator(x.device).manual_seed(seed_of(self.seed, step, row, site))
            full_LI.bernoulli_(1.0 - dropout, generator=generator)
            mask[m] = full_LI[: x.shape[1]] if x.dim() == 3 else full_LI[0]
        return mask.div_(1.0 - dropout)

    def _is_of_rows(self, x: Tensor, rows_M: tuple[int, ...]) -> bool:
        """DeBERTa's linears also take the table of relative positions, the same for all rows."""
        if x.dim() == 3 and self.num_positions is not None and x.shape[1] != self.num_positions:
            return False
        return x.shape[0] == len(rows_M)
