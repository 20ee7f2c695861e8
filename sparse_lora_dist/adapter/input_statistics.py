"""Collect statistics of an adapted linear's inputs and output gradients during one optimizer step.

Some methods compute new adapter tensors from these statistics. A site is a linear that has an
adapter; a row is one training sequence.

Shapes: M rows of a micro-batch, T tokens of a row, I in_features, O out_features, N rows of a step.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sparse_lora_dist.distributed import comm
from sparse_lora_dist.zero3.slices import shard_of


@dataclass(frozen=True, kw_only=True, slots=True)
class RowMetadata:
    """Numbers and lengths of a micro-batch's rows. Forward stores them, and backward reads them."""

    rows_M: tuple[int, ...]
    """Number of each row in the stream of rows that the run trains on; -1 for filler rows."""
    lengths_M: tuple[int, ...]
    """Number of tokens at the front of each row; the rest is padding. 0 for filler rows."""
    num_positions: int | None
    """Padded length of the rows, in tokens (T in shapes). None: unknown."""
    _masks: dict[tuple[int, torch.device], Tensor] = field(default_factory=dict, compare=False)

    def tokens_MT(self, length: int, device: torch.device) -> Tensor:
        """Return a mask of the rows' first ``length`` positions: True for tokens, False for
        padding. It is made once for all linears, since a GPU has to be waited for."""
        if (length, device) not in self._masks:
            lengths_M = torch.tensor(self.lengths_M, device=device)
            self._masks[length, device] = torch.arange(length, device=device) < lengths_M[:, None]
        return self._masks[length, device]


@dataclass(kw_only=True)
class InputStatistics:
    """Statistics of one site on this rank, summed over the micro-batches of one optimizer step.

    Three kinds can be collected, each if its switch is True: ``squares`` of the inputs, the
    ``gradient`` of the frozen weight, and the mean input of each of the batch's ``rows``. Padding
    tokens are left out.
    """

    squares: bool = False
    """True: collect ``squares_I`` and ``num_tokens``."""
    gradient: bool = False
    """True: collect ``gradient_share``."""
    rows: bool = False
    """True: collect ``means``."""
    num_tokens: int = 0
    """Number of this rank's tokens that ``squares_I`` sums over."""
    squares_I: Tensor | float = 0.0
    """Sum of the squared inputs of this rank's tokens, one per input feature, float64 [I]; 0.0
    before the first backward."""
    gradient_share: Tensor | float = 0.0
    """This rank's shard of the gradient of the loss with respect to the linear's frozen weight
    [O, I], flattened, averaged over ranks, fp32; 0.0 before the first backward."""
    means: dict[int, Tensor] = field(default_factory=dict)
    """Row number -> mean of the site's input over the row's tokens, fp32 [I], for each row of the
    step that this rank trains. Filler rows are left out."""

    def add(self, x: Tensor, grad_y: Tensor, row_metadata: RowMetadata) -> None:
        """Add one backward's input and output gradient to the statistics.

        Backward calls it for each forward of the site. Collective if ``gradient`` is True.

        Args:
            x: input of the site before dropout: [M, T, I], [M * T, I], or [M, I] with one token
                for each row. Inputs of any other shape belong to no row and count for
                ``gradient_share`` only.
            grad_y: gradient of the loss with respect to the site's output, [..., O].
            row_metadata: rows of the micro-batch that ``x`` comes from.
        """
        if self.gradient:
            self._add_gradient(x.flatten(0, -2), grad_y.flatten(0, -2))
        if (x_MTI := _by_row(x, row_metadata)) is None or not (self.squares or self.rows):
            return
        length = x_MTI.shape[1]
        is_token_MT = row_metadata.tokens_MT(length, x.device)
        kept_MTI = torch.where(is_token_MT[..., None], x_MTI.float(), 0.0)
        if self.squares:
            self.squares_I = self.squares_I + kept_MTI.square().sum(dim=(0, 1)).double()
            self.num_tokens += sum(min(n, length) for n in row_metadata.lengths_M)
        if self.rows:
            means_MI = kept_MTI.sum(dim=1) / is_token_MT.sum(dim=1, keepdim=True).clamp(min=1)
            rows = zip(row_metadata.rows_M, row_metadata.lengths_M, means_MI, strict=True)
            self.means |= {row: mean_I for row, length, mean_I in rows if length > 0}

    def _add_gradient(self, x_TI: Tensor, grad_TO: Tensor) -> None:
        with _exact_in_tf32(x_TI.dtype):
            own_OI = grad_TO.float().t() @ x_TI.float()
        # DeepSpeed averages gradients over ranks, and the loss is scaled up to make up for it.
        share = comm.sum_to_shards(own_OI, shard_of(own_OI.numel()))
        self.gradient_share = self.gradient_share + share / comm.world_size()

    def gathered_rows(self) -> Tensor | None:
        """Return the mean input of every row of the step, gathered from all ranks. Collective.

        Returns:
            fp32 [N, I] on this rank's device, rows in training order, the same on every rank; None
            if no rank has collected a row.
        """
        everyone: dict[int, Tensor] = {}
        for theirs in comm.gather_objects({row: m.cpu() for row, m in self.means.items()}):
            everyone |= theirs
        if not everyone:
            return None
        return torch.stack([everyone[row] for row in sorted(everyone)]).to(comm.device())


@contextmanager
def _exact_in_tf32(dtype: torch.dtype) -> Iterator[None]:
    """Context manager: let GPUs multiply fp32 copies of tensors of ``dtype`` as TF32, which holds
    bf16 and fp16 exactly, and takes an eighth of the time."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = before or dtype in (torch.bfloat16, torch.float16)
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def _by_row(x: Tensor, row_metadata: RowMetadata) -> Tensor | None:
    """Return a view of a site's input as [M, T, I]: row, token, feature.

    Returns None if the shape does not fit the rows, like that of DeBERTa's table of relative
    positions.

    Args:
        x: input of the site.
        row_metadata: rows of the micro-batch that ``x`` comes from.
    """
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
