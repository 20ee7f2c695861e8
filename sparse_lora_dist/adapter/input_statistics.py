"""What the backwards of a step show of one site, for who writes its tensors anew.

Shapes: M rows of a micro-batch, T tokens of a row, I in_features, O out_features, N rows of a step.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from sparse_lora_dist.distributed import comm
from sparse_lora_dist.zero3.shares import own_range


@dataclass(frozen=True, kw_only=True, slots=True)
class RowMetadata:
    """Which rows a micro-batch has."""

    rows_M: tuple[int, ...]
    lengths_M: tuple[int, ...]
    num_positions: int | None


@dataclass(kw_only=True)
class InputStatistics:
    """Adds up, over the micro-batches of a step, what it was told to."""

    squares: bool = False
    gradient: bool = False
    rows: bool = False
    num_tokens: int = 0
    squares_I: Tensor | float = 0.0
    """Sum over this rank's tokens, float64."""
    gradient_share: Tensor | float = 0.0
    """This rank's share of the mean over all ranks, fp32, 1-D."""
    means: dict[int, Tensor] = field(default_factory=dict)
    """Row -> its mean input, fp32 [I]."""

    def add(self, x: Tensor, grad_y: Tensor, row_metadata: RowMetadata) -> None:
        """At one backward. Collective where the gradient is taken."""
        if self.gradient:
            self._take_gradient(x.flatten(0, -2), grad_y.flatten(0, -2))
        if (x_MTI := _by_row(x, row_metadata)) is None or not (self.squares or self.rows):
            return
        lengths_M = torch.tensor(row_metadata.lengths_M, device=x.device).clamp(max=x_MTI.shape[1])
        is_token_MT = torch.arange(x_MTI.shape[1], device=x.device) < lengths_M[:, None]
        kept_MTI = torch.where(is_token_MT[..., None], x_MTI.float(), 0.0)
        if self.squares:
            self.squares_I = self.squares_I + kept_MTI.square().sum(dim=(0, 1)).double()
            self.num_tokens += int(lengths_M.sum())
        if self.rows:
            means_MI = kept_MTI.sum(dim=1) / lengths_M.clamp(min=1)[:, None]
            rows = zip(row_metadata.rows_M, row_metadata.lengths_M, means_MI, strict=True)
            self.means |= {row: mean_I for row, length, mean_I in rows if length > 0}

    def _take_gradient(self, x_TI: Tensor, grad_TO: Tensor) -> None:
        own_OI = grad_TO.float().t() @ x_TI.float()
        # Averaged, as DeepSpeed averages what trains: the loss was scaled up for it.
        whole = comm.sum_over_ranks(own_OI).flatten()
        start, stop = own_range(whole.numel())
        self.gradient_share = self.gradient_share + whole[start:stop] / comm.world_size()

    def gathered_rows(self) -> Tensor | None:
        """[N, I], of all ranks, in the order of the stream; None where the site saw none.
        Collective."""
        everyone: dict[int, Tensor] = {}
        for theirs in comm.gather_objects({row: m.cpu() for row, m in self.means.items()}):
            everyone |= theirs
        if not everyone:
            return None
        return torch.stack([everyone[row] for row in sorted(everyone)]).to(comm.device())


def _by_row(x: Tensor, row_metadata: RowMetadata) -> Tensor | None:
    """[M, T, I]; None for what is of no row, as DeBERTa's table of relative positions."""
    count = len(row_metadata.rows_M)
    if x.dim() == 3:
        whole = row_metadata.num_positions in (None, x.shape[1])
        return x if whole and len(x) == count else None
    if len(x) == count:  # one token stands for each row
        return x[:, None]
    return (
        x.view(count, -1, x.shape[-1])
        if len(x) == count * (row_metadata.num_positions or 0)
        else None
    )
