"""Runs one real rank of a large job alone; the other ranks are simulated.

The rank has its real number in a group of the real size, so its shards and byte ranges are those of
the real job. What the other ranks would send is made up:

    all-gather    of the scales: every rank sends this rank's own
    broadcast     of the scales' means: this rank's own
    the rest      barriers, maxima and pickled objects, and what the model is asked before it is
                  loaded: this rank's own
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from sparse_lora_dist.base_model import nf4
from sparse_lora_dist.base_model.nf4_shard import own_weights, quantized_part
from sparse_lora_dist.distributed import comm
from sparse_lora_dist.model import model
from sparse_lora_dist.model.look import look_at


def pretend(rank: int, ranks: int) -> None:
    """Instead of ``comm.start``."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")  # nobody meets there
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
    comm._patient = dist.group.WORLD
    patch.object(model, "look_together", look_at).start()  # rank 0, which would tell, is not there


@contextmanager
def true_scales(w_N: Tensor, layout: nf4.Layout, dtype: torch.dtype) -> Iterator[None]:
    """Inside, the all-gather of a weight's scales brings what the other ranks would really send."""
    rows = []
    for rank in range(comm.world_size()):
        with patch.object(comm, "rank", lambda rank=rank: rank):
            start, stop = own_weights(layout, dtype)
            rows.append(quantized_part(w_N[start:stop], layout, dtype)[1])

    def gathered(shard: Tensor, numel: int) -> Tensor:
        everyone = shard.new_zeros(len(rows), shard.numel())
        for row, absmax in zip(everyone, rows, strict=True):
            row[: absmax.numel()] = absmax
        return everyone.flatten()[:numel]

    with patch.object(comm, "all_gather_flat", gathered):
        yield
