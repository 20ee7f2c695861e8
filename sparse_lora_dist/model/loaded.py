"""Print what was loaded: the base, and what trains on it."""

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from sparse_lora_dist.base_model.shard_loader import LoadReport
from sparse_lora_dist.distributed import comm
from sparse_lora_dist.distributed.console import counted, megabytes, print_line


def print_loaded(
    folder: Path, report: LoadReport, *, head: str, trained: Sequence[int], num_adapters: int
) -> None:
    """Print the base, the bytes read, unquantised weights, the head and the adapters.

    Each number of bytes is that of the rank with the most. Collective.

    Args:
        folder: local folder of the base.
        report: what the loader read on this rank.
        head: line about a classifier's head; "" for a causal language model.
        trained: number of elements of each trained tensor.
        num_adapters: number of linears with an adapter.
    """
    costs = [report.linear_bytes_read, report.other_bytes_read, report.bytes_received]
    most = comm.max_over_ranks(torch.tensor(costs, device=comm.device()))
    linear, other, received = (megabytes(int(n)) for n in most)
    print_line("base", f"{folder}, on {counted(comm.world_size(), 'rank')}")
    print_line(
        "",
        f"read per rank: {linear} of {megabytes(report.linear_bytes_in_file)} of linear weights",
    )
    print_line("", f"and {other} of other weights; received from other ranks: {received} of scales")
    if report.experts:
        print_line("", f"{report.experts:,} experts quantised to 4 bits one by one, no adapters")
    for name, count, size in _grouped(report.unquantized):
        times = f"{count} x " if count > 1 else ""
        print_line("", f"not quantised: {times}{name} ({megabytes(size)})")
    if head:
        print_line("head", head)
    print_line("adapter", f"{num_adapters} linears, {sum(trained):,} trained parameters")


def _grouped(sizes: dict[str, int]) -> Iterator[tuple[str, int, int]]:
    """Group names that differ only in their numbers, such as those of a model's layers.

    Args:
        sizes: name -> bytes.

    Yields:
        (name, number of names in the group, their bytes together) for each group. In the name of a
        group of several, numbers are replaced by "*".
    """
    groups: dict[str, list[int]] = defaultdict(list)
    for name, size in sizes.items():
        groups[re.sub(r"\b\d+\b", "*", name)].append(size)
    first = {re.sub(r"\b\d+\b", "*", name): name for name in reversed(sizes)}
    for pattern, group in groups.items():
        yield pattern if len(group) > 1 else first[pattern], len(group), sum(group)
