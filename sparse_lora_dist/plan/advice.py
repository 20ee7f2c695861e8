"""Does it fit, on how many GPUs would it, and what to change where it does not."""

import bisect
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from sparse_lora_dist.config.config import Config
from sparse_lora_dist.plan.memory import rank_memory
from sparse_lora_dist.plan.scenario import PlannedEngine, Ranks, Shapes

MOST_RANKS = 4096


@dataclass(frozen=True, kw_only=True, slots=True)
class Need:
    """Bytes that a run asks for."""

    gpu: int
    """Of each GPU."""
    host: int
    """Of each machine."""

    def fits(self, limits: "Limits") -> bool:
        """Into what there is?"""
        return self.gpu <= limits.gpu and (limits.host is None or self.host <= limits.host)


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """Bytes of a GPU, and of a machine's memory where that is to be checked."""

    gpu: int
    host: int | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """Something else than what was asked, and what it would need."""

    what: str
    need: Need


def need_of(shapes: Shapes, engine: PlannedEngine, ranks: Ranks) -> Need:
    """Peaks over loading and training."""
    memory = rank_memory(shapes, engine, ranks)
    return Need(gpu=memory.peak("gpu"), host=memory.peak("host") * ranks.per_node)


def smallest_world(
    shapes: Shapes, engine: PlannedEngine, ranks: Ranks, limits: Limits
) -> int | None:
    """The least number of ranks that fits, on one machine with as many GPUs as now or on several
    that are full; None: none does. hpZ's partition divides it, or the run would be refused."""

    def fits(count: int) -> bool:
        spread = replace(ranks, world_size=count, nodes=-(-count // ranks.per_node))
        return need_of(shapes, engine, spread).fits(limits)

    if engine.settles_ranks:
        return ranks.world_size if fits(ranks.world_size) else None
    # One by one: more ranks on a machine need more of its memory, and one alone gathers nothing.
    for count in range(engine.hpz, ranks.per_node + 1, engine.hpz):
        if fits(count):
            return count
    full = math.lcm(ranks.per_node, engine.hpz)
    counts = range(full, MOST_RANKS + 1, full)
    # More machines never need more of each.
    first = bisect.bisect_left(counts, True, key=fits)
    return counts[first] if first < len(counts) else None


def changes(shapes: Shapes, engine: PlannedEngine, ranks: Ranks) -> list[Change]:
    """Each by itself, and last all that can go together."""
    found = [
        Change(what=what, need=need_of(other, own, spread))
        for what, other, own, spread in _variants(shapes, engine, ranks)
    ]
    return sorted(found, key=lambda change: change.need.gpu)


Variant = tuple[str, Shapes, PlannedEngine, Ranks]


def _variants(shapes: Shapes, engine: PlannedEngine, ranks: Ranks) -> Iterator[Variant]:
    config = shapes.config
    thrifty, words = config, []
    for what, part, name, value in _savings(config):
        thrifty = _with(thrifty, part, **{name: value})
        words.append(what)
        yield what, shapes.with_config(_with(config, part, **{name: value})), engine, ranks
    if shapes.whole_logits:
        yield (
            "the loss in chunks (it is, unless --whole_logits)",
            shapes.with_config(config, whole_logits=False),
            engine,
            ranks,
        )
    # As in that file, whatever this one has.
    away = replace(engine, parameters="cpu", optimizer="cpu", hpz=1, nvme_buffers=0, pinned=True)
    if ranks.on_gpu and away != engine:
        yield "--ds_config ds_configs/zero3_offload.json", shapes, away, ranks
    if engine.hpz > 1:
        yield (
            "no copy of the base in each node: zero3.json instead of hpZ",
            shapes,
            replace(engine, hpz=1),
            ranks,
        )
    single = replace(engine, bounds=replace(engine.bounds, one_by_one=True))
    if ranks.world_size > 1 and single != engine:
        yield "stage3_allgather_sequential true in the engine file", shapes, single, ranks
    double = replace(ranks, world_size=2 * ranks.world_size, nodes=2 * ranks.nodes)
    if not engine.settles_ranks:
        yield f"{double.world_size} ranks", shapes, engine, double
    if words and ranks.on_gpu:
        what = "offload and " + ", ".join(words)
        yield what, shapes.with_config(thrifty), away, ranks


def _savings(config: Config) -> Iterator[tuple[str, str, str, Any]]:
    if not config.model.gradient_checkpointing:
        yield "--gradient_checkpointing true", "model", "gradient_checkpointing", True
    if (rows := config.train.micro_batch_size) > 1:
        yield f"--micro_batch_size {rows // 2}", "train", "micro_batch_size", rows // 2
    if (tokens := config.data.sequence_length // 2) >= 8:
        yield f"--sequence_length {tokens}", "data", "sequence_length", tokens
    if config.train.moment_bits == 32:
        yield "--moment_bits 8", "train", "moment_bits", 8


def _with(config: Config, part: str, **values: Any) -> Config:
    return replace(config, **{part: replace(getattr(config, part), **values)})
