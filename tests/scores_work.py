"""What workers run for ``test_scores.py``: one shard each, cut anywhere."""

from typing import Any

import torch
from torch import Tensor

from sparse_lora_dist import comm
from sparse_lora_dist.scores import segment_sum, top_k


def choose(cases: list[dict[str, Any]]) -> list[tuple[Tensor, Tensor]]:
    """(mask of this rank's shard, sums of all segments) of each case."""
    return [choose_one(**case) for case in cases]


def choose_one(
    values: list[float], shape: tuple[int, int], cuts: list[int], by: Any, k: int
) -> tuple[Tensor, Tensor]:
    """One case; rank r holds elements [cuts[r], cuts[r + 1])."""
    start, stop = cuts[comm.rank()], cuts[comm.rank() + 1]
    shard = torch.tensor(values[start:stop], dtype=torch.float32)
    return top_k(shard, start, shape, by, k), segment_sum(shard, start, shape, by)


def refused(values: list[float]) -> str:
    """What is said when only rank 0's shard holds a bad value."""
    shard = torch.tensor(values if comm.rank() == 0 else [0.0] * len(values))
    try:
        top_k(shard, comm.rank() * len(values), (comm.world_size(), len(values)), "row", 1)
    except FloatingPointError as error:
        return str(error)
    return "nothing"


def traffic(rows: int, columns: int) -> dict[str, int]:
    """Bytes that choosing a tenth of each row costs this rank, and what gathering would."""
    share = rows * columns // comm.world_size()
    shard = torch.randn(share, generator=torch.Generator().manual_seed(comm.rank()))
    before = comm.traffic_bytes.total()
    top_k(shard, comm.rank() * share, (rows, columns), "row", columns // 10)
    selected = comm.traffic_bytes.total() - before
    before = comm.traffic_bytes.total()
    comm.all_gather_flat(shard, rows * columns)
    return {"select": selected, "gather": comm.traffic_bytes.total() - before}
