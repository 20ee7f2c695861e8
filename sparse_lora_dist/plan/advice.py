"""Whether a run fits, on how few ranks it would fit, and changes that save memory."""

import bisect
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from sparse_lora_dist.config.config import Config
from sparse_lora_dist.plan.memory import rank_memory
from sparse_lora_dist.plan.scenario import PlannedEngine, Ranks, Shapes

MAX_RANKS = 4096
"""Largest number of ranks that is tried."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Need:
    """Peak memory of a run over loading, training and saving, in bytes."""

    gpu: int
    """Bytes of the GPU of the rank that needs most."""
    host: int
    """Bytes of host memory of a machine, all its ranks together."""

    def fits(self, limits: "Limits") -> bool:
        """Does the run fit into ``limits``?"""
        return self.gpu <= limits.gpu and (limits.host is None or self.host <= limits.host)


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """Memory that there is, in bytes."""

    gpu: int
    """Memory of one GPU."""
    host: int | None
    """Memory of one machine; None leaves it unchecked."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """A change to the planned run, and the memory that the run would then need."""

    what: str
    """The options or the engine file to set, in words."""
    need: Need


def need_of(shapes: Shapes, engine: PlannedEngine, ranks: Ranks) -> Need:
    """Return the peak memory of a run.

    Args:
        shapes: the model and what trains on it.
        engine: the memory settings of the engine file.
        ranks: the ranks and machines of the job.
    """
    memory = rank_memory(shapes, engine, ranks)
    return Need(gpu=memory.peak("gpu"), host=memory.peak("host") * ranks.per_node)


def smallest_world(
    shapes: Shapes, engine: PlannedEngine, ranks: Ranks, limits: Limits
) -> int | None:
    """Find the smallest number of ranks on which the run fits, up to ``MAX_RANKS``.

    Tried are all numbers of ranks on one machine, up to ``ranks.per_node``, and then full machines.
    Only multiples of hpZ's partition size are tried, as training refuses others. If the engine file
    sets train_batch_size, only the present number is tried.

    Returns:
        The number of ranks, or None if the run fits on none.
    """

    def fits(count: int) -> bool:
        spread = replace(ranks, world_size=count, nodes=-(-count // ranks.per_node))
        return need_of(shapes, engine, spread).fits(limits)

    if engine.settles_ranks:
        return ranks.world_size if fits(ranks.world_size) else None
    # Not by bisection: more ranks on a machine need more of its memory, and a single rank gathers
    # nothing, so the need neither only grows nor only shrinks.
    for count in range(engine.hpz, ranks.per_node + 1, engine.hpz):
        if fits(count):
            return count
    full = math.lcm(ranks.per_node, engine.hpz)
    counts = range(full, MAX_RANKS + 1, full)
    # Bisection, because with more machines none of them needs more memory.
    first = bisect.bisect_left(counts, True, key=fits)
    return counts[first] if first < len(counts) else None


def changes(shapes: Shapes, engine: PlannedEngine, ranks: Ranks) -> list[Change]:
    """List changes that save memory, by the GPU memory needed: each alone, and all combined."""
    found = [
        Change(what=what, need=need_of(other, own, spread))
        for what, other, own, spread in _variants(shapes, engine, ranks)
    ]
    return sorted(found, key=lambda change: change.need.gpu)


Variant = tuple[str, Shapes, PlannedEngine, Ranks]
"""(the change in words, and what the changed run consists of)."""


def _variants(shapes: Shapes, engine: PlannedEngine, ranks: Ranks) -> Iterator[Variant]:
    config = shapes.config
    saving, words = config, []
    for what, part, name, value in _savings(config):
        saving = _with(saving, part, **{name: value})
        words.append(what)
        yield what, shapes.with_config(_with(config, part, **{name: value})), engine, ranks
    if shapes.whole_logits:
        yield (
            "the loss in chunks, without --whole_logits",
            shapes.with_config(config, whole_logits=False),
            engine,
            ranks,
        )
    # The values of that file, whatever the present engine file has.
    away = replace(engine, parameters="cpu", optimizer="cpu", hpz=1, nvme_buffers=0, pinned=True)
    if ranks.on_gpu and away != engine:
        yield "--ds_config ds_configs/zero3_offload.json", shapes, away, ranks
    if engine.hpz > 1:
        yield (
            "zero3.json instead of hpZ: no second copy of the base in each node",
            shapes,
            replace(engine, hpz=1),
            ranks,
        )
    single = replace(engine, bounds=replace(engine.bounds, one_by_one=True))
    if ranks.world_size > 1 and single != engine:
        yield "stage3_allgather_sequential: true in the engine file", shapes, single, ranks
    double = replace(ranks, world_size=2 * ranks.world_size, nodes=2 * ranks.nodes)
    if not engine.settles_ranks:
        yield f"{double.world_size} ranks", shapes, engine, double
    if words and ranks.on_gpu:
        what = "offload and " + ", ".join(words)
        yield what, shapes.with_config(saving), away, ranks


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
