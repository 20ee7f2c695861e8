"""Draw dropout masks for inputs of adapters; the mask of a row is the same on any number of ranks.

A row is one training sequence of a batch. A site is a linear of the base that has an adapter.

Shapes: M rows of a micro-batch, T tokens of a row, I in_features, L tokens of a full-length row.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from sparse_lora_dist.adapter.input_statistics import RowMetadata
from sparse_lora_dist.adapter.seeds import seed_of


@dataclass
class RowSeeds:
    """Rows of this rank's current micro-batch, whose numbers seed the rows' dropout masks.

    All adapters of a model share one instance. The mask of a row depends only on the seed of the
    run, the step, the number of the row and the name of the site, so neither the number of ranks
    nor the micro-batch size changes it.
    """

    seed: int
    """Seed of the run."""
    sequence_length: int
    """Number of tokens of a full-length row (L in shapes)."""
    step: int = 0
    """Current optimizer step, counted from 1."""
    rows_M: tuple[int, ...] = field(default=())
    """Number of each row in the stream of rows that the run trains on; -1 for filler rows."""
    lengths_M: tuple[int, ...] = field(default=())
    """Number of tokens at the front of each row; the rest is padding. 0 for filler rows."""
    num_positions: int | None = None
    """Padded length of the micro-batch's rows, in tokens (T in shapes). None: unknown; then any 3-D
    input whose first axis has as many entries as there are rows counts as [M, T, I]."""
    micro_batch: int = 0
    """Number of micro-batches begun so far on this rank. 0 if ``begin`` is never called."""
    _metadata: RowMetadata | None = field(default=None, repr=False)

    def begin(
        self, rows_M: tuple[int, ...], lengths_M: tuple[int, ...], *, num_positions: int
    ) -> None:
        """Store the rows of the micro-batch that forward takes next, and count the micro-batch.

        Must be called on each rank before the forward of each of its micro-batches. Not a
        collective.

        Args:
            rows_M: number of each row in the stream of rows that the run trains on; -1 for filler
                rows.
            lengths_M: number of tokens at the front of each row that are not padding; 0 for filler
                rows.
            num_positions: padded length of the rows, in tokens.
        """
        self.rows_M, self.lengths_M, self.num_positions = rows_M, lengths_M, num_positions
        self.micro_batch += 1

    def row_metadata(self) -> RowMetadata:
        """Return the current micro-batch's row numbers, lengths and padded length.

        Forward keeps it for backward, because the next micro-batch may have begun by then. All
        linears of a micro-batch get the same object.
        """
        now = (self.rows_M, self.lengths_M, self.num_positions)
        found = self._metadata
        if found is None or (found.rows_M, found.lengths_M, found.num_positions) != now:
            rows_M, lengths_M, num_positions = now
            found = RowMetadata(rows_M=rows_M, lengths_M=lengths_M, num_positions=num_positions)
            self._metadata = found
        return found

    def keep_mask(
        self, x: Tensor, site: str, rows_M: tuple[int, ...], step: int, dropout: float
    ) -> Tensor:
        """Return a dropout mask: 1 / (1 - dropout) where an entry is kept, 0 where it is dropped.

        Args:
            x: input of the site: [M, T, I], [M * T, I], or [M, I] with one token for each row. An
                input of any other shape (DeBERTa's table of relative positions) belongs to no row:
                its mask is seeded by run, step and site only.
            site: name of the site.
            rows_M: ``RowSeeds.rows_M`` of the micro-batch that ``x`` comes from.
            step: optimizer step, counted from 1, that ``x`` comes from.
            dropout: probability with which an entry is dropped, in [0, 1).

        Returns:
            The mask, with the shape, dtype and device of ``x``.
        """
        if x.dim() == 2 and len(x) == len(rows_M) * (self.num_positions or 0):
            x_MTI = x.view(len(rows_M), -1, x.shape[1])
            return self.keep_mask(x_MTI, site, rows_M, step, dropout).view_as(x)
        mask = torch.empty_like(x)
        if not self._has_row_axis(x, rows_M):
            generator = torch.Generator(x.device).manual_seed(seed_of(self.seed, step, site))
            return mask.bernoulli_(1.0 - dropout, generator=generator).div_(1.0 - dropout)
        # Drawn at full length, then cut: a row's mask must not depend on how far the row is padded.
        full_LI = x.new_empty(self.sequence_length, x.shape[-1])
        for m, row in enumerate(rows_M):
            generator = torch.Generator(x.device).manual_seed(seed_of(self.seed, step, row, site))
            full_LI.bernoulli_(1.0 - dropout, generator=generator)
            mask[m] = full_LI[: x.shape[1]] if x.dim() == 3 else full_LI[0]
        return mask.div_(1.0 - dropout)

    def _has_row_axis(self, x: Tensor, rows_M: tuple[int, ...]) -> bool:
        # DeBERTa's linears also take the table of relative positions, the same for all rows.
        if x.dim() == 3 and self.num_positions is not None and x.shape[1] != self.num_positions:
            return False
        return x.shape[0] == len(rows_M)
