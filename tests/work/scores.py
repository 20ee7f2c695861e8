"""What workers run for ``test_scores.py``: every tensor cut anywhere, or in equal shares."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sparse_lora_dist.distributed import comm
from sparse_lora_dist.methods.protocol.method import By
from sparse_lora_dist.sparsity import sharded_scores as scores
from sparse_lora_dist.sparsity.sharded_scores import ShardScores

Shards = dict[str, Tensor]


@dataclass(frozen=True)
class Part:
    """Where this rank's part of a tensor lies."""

    shape: tuple[int, ...]
    start: int
    length: int


@dataclass(frozen=True)
class Question:
    """A tensor, and what is asked about it. Rank r has elements [cuts[r], cuts[r + 1])."""

    values: list[float]
    """Lists, since a tensor through a pipe between processes costs a shared file each."""
    living: list[bool]
    shape: tuple[int, ...]
    cuts: tuple[int, ...]
    by: By
    k: int


Questions = Mapping[str, Question]


def shard_scores(questions: Questions, rank: int) -> ShardScores:
    """What this rank knows."""
    ends = {name: (q.cuts[rank], q.cuts[rank + 1]) for name, q in questions.items()}
    return ShardScores(
        slices={
            name: Part(q.shape, ends[name][0], ends[name][1] - ends[name][0])
            for name, q in questions.items()
        },
        score=lambda name: torch.tensor(questions[name].values[slice(*ends[name])]),
        live_mask=lambda name: torch.tensor(questions[name].living[slice(*ends[name])]).bool(),
        site_stats=torch.zeros(0, 0),
    )


def answers(questions: Questions) -> tuple[Shards, Shards, Shards, Shards, Shards]:
    """(masks, masks with all ties, sums spread out; sums, living): shards first, then whole."""
    asked = shard_scores(questions, comm.rank())
    by = {name: q.by for name, q in questions.items()}
    k = {name: q.k for name, q in questions.items()}
    sums = asked.sums(by)
    spread = {name: asked.spread(name, sums[name], by[name]) for name in by}
    return asked.top_k(k, by), asked.top_k(k, by, "all"), spread, sums, asked.live(by)


def answers_in_groups(
    cases: list[tuple[Questions, int, int]],
) -> list[list[dict[str, list[Any]]]]:
    """The answers of each case under its own bounds of a group: (questions, entries, segments)."""
    found = []
    for questions, entries, segments in cases:
        with bounds(entries, segments):
            found.append([{n: t.tolist() for n, t in a.items()} for a in answers(questions)])
    return found


@contextmanager
def bounds(entries: int, segments: int) -> Iterator[None]:
    """Other bounds of a group inside."""
    before = scores.GROUP_ENTRIES, scores.GROUP_SEGMENTS
    scores.GROUP_ENTRIES, scores.GROUP_SEGMENTS = entries, segments
    try:
        yield
    finally:
        scores.GROUP_ENTRIES, scores.GROUP_SEGMENTS = before


def refused(bad: float) -> list[str]:
    """What top_k and sums say when the last rank's part of the second tensor has a bad value."""
    world = comm.world_size()
    numel, cuts = 2 * world, tuple(range(0, 2 * world + 1, 2))
    asked = shard_scores(
        {
            "first": Question([1.0] * numel, [], (numel,), cuts, "tensor", 1),
            "second": Question([1.0] * (numel - 1) + [bad], [], (numel,), cuts, "tensor", 1),
        },
        comm.rank(),
    )
    by: dict[str, By] = {"first": "tensor", "second": "tensor"}
    said = []
    for ask in (partial(asked.top_k, dict.fromkeys(by, 1), by), partial(asked.sums, by)):
        try:
            ask()
        except FloatingPointError as error:
            said.append(str(error))
    return said


def costs(rows: int, columns: int, tensors: int) -> dict[str, dict[str, int]]:
    """Collectives and bytes of each call, about tensors cut in equal shares, on this rank."""
    share = rows * columns // comm.world_size()
    names = [f"tensor{i}" for i in range(tensors)]
    shard = torch.randn(share, generator=torch.Generator().manual_seed(comm.rank()))
    asked = ShardScores(
        slices=dict.fromkeys(names, Part((rows, columns), share * comm.rank(), share)),
        score=lambda name: shard,
        live_mask=lambda name: shard > 0,
        site_stats=torch.zeros(0, 0),
    )
    by: dict[str, By] = dict.fromkeys(names, "row")
    calls: dict[str, Callable[[], object]] = {
        "top_k": partial(asked.top_k, dict.fromkeys(names, columns // 10), by),
        "top_k with all ties": partial(asked.top_k, dict.fromkeys(names, 1), by, "all"),
        "sums": partial(asked.sums, by),
        "live": partial(asked.live, by),
        "gather": partial(comm.all_gather_flat, shard, rows * columns),
    }
    found = {}
    for name, call in calls.items():
        before = comm.traffic_bytes.total()
        with collectives() as count:
            call()
        found[name] = {"bytes": comm.traffic_bytes.total() - before, "calls": len(count)}
    return found


@contextmanager
def collectives() -> Iterator[list[str]]:
    """The names of those that run inside, one after another."""
    names: list[str] = []
    originals = {name: getattr(dist, name) for name in ("all_reduce", "all_gather_into_tensor")}

    def counting(name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            names.append(name)
            return originals[name](*args, **kwargs)

        return call

    try:
        for name in originals:
            setattr(dist, name, counting(name))
        yield names
    finally:
        for name, function in originals.items():
            setattr(dist, name, function)
