"""Peak memory of a planned run, and advice for a run that needs more memory than there is.

The advice has two parts: the smallest number of ranks on which the run fits, and a list of changes
of settings with the peak memory that the run would need with each.
"""

import bisect
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from sparse_lora_dist.config.config import Config
from sparse_lora_dist.plan.memory import rank_memory
from sparse_lora_dist.plan.scenario import PlannedEngine, Ranks, Shapes

MAX_RANKS = 4096
"""Largest number of ranks that ``smallest_world`` tries."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Need:
    """Peak memory that a run needs, over loading, training and saving."""

    gpu: int
    """Peak bytes on the GPU of the rank that needs most; 0 for ranks on CPUs."""
    host: int
    """Peak bytes of host memory on one machine, summed over its ranks."""

    def fits(self, limits: "Limits") -> bool:
        """Return True if the run needs neither more GPU nor more host memory than ``limits``."""
        return self.gpu <= limits.gpu and (limits.host is None or self.host <= limits.host)


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """Memory that is available to a run."""

    gpu: int
    """Bytes of memory of one GPU; 0 for ranks on CPUs."""
    host: int | None
    """Bytes of host memory of one machine. None: host memory is not checked."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """A change of settings that may save memory."""

    what: str
    """What to change, for the user to read, e.g. "--moment_bits 8"."""
    need: Need
    """Peak memory of the run with this change."""


def need_of(shapes: Shapes, engine: PlannedEngine, ranks: Ranks) -> Need:
    """Return the peak memory of a run.

    Args:
        shapes: the model, its adapters and the options of the run.
        engine: the memory settings of the engine file, which is the DeepSpeed JSON file.
        ranks: number of ranks and of machines, and whether the ranks have GPUs.

    Returns:
        Bytes on the GPU of the rank that needs most, and bytes of host memory on one machine.
    """
    memory = rank_memory(shapes, engine, ranks)
    return Need(gpu=memory.peak("gpu"), host=memory.peak("host") * ranks.per_node)


def smallest_world(
    shapes: Shapes, engine: PlannedEngine, ranks: Ranks, limits: Limits
) -> int | None:
    """Return the smallest number of ranks on which the run fits, up to ``MAX_RANKS``.

    The function tries each number of ranks on one machine, up to ``ranks.per_node``, and then each
    number of full machines. It tries multiples of zero_hpz_partition_size only, because training
    refuses other numbers. If the engine file sets train_batch_size, it tries only the present
    number of ranks, since the batch size fixes it.

    Args:
        shapes: the model, its adapters and the options of the run.
        engine: the memory settings of the engine file, which is the DeepSpeed JSON file.
        ranks: the ranks that the user asked for; they set the largest number per machine.
        limits: memory of one GPU and of one machine.

    Returns:
        The number of ranks on all machines together, or None if the run fits on none of the tried
        numbers.
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
    """Return changes of settings that may save memory, with the memory of the run under each.

    Each change is planned alone. For ranks on GPUs, one more change makes several at once: CPU
    offload and all the changes of single options, such as ``--moment_bits 8``.

    Args:
        shapes: the model, its adapters and the options of the run.
        engine: the memory settings of the engine file, which is the DeepSpeed JSON file.
        ranks: number of ranks and of machines, and whether the ranks have GPUs.

    Returns:
        The changes, sorted by the GPU memory that the run needs with each, least first. Changes
        with which the run still does not fit are included.
    """
    found = [
        Change(what=what, need=need_of(other, own, spread))
        for what, other, own, spread in _variants(shapes, engine, ranks)
    ]
    return sorted(found, key=lambda change: change.need.gpu)


SHARDED = 8192
"""stage3_param_persistence_threshold of zero3.json and zero3_offload.json."""
Variant = tuple[str, Shapes, PlannedEngine, Ranks]
"""(text of the change, and the shapes, engine settings and ranks of the changed run)."""


def _variants(shapes: Shapes, engine: PlannedEngine, ranks: Ranks) -> Iterator[Variant]:
    config = shapes.config
    saving, words = config, []
    for what, part, name, value in _savings(config):
        saving = _with(saving, part, **{name: value})
        words.append(what)
        yield what, shapes.with_config(_with(config, part, **{name: value})), engine, ranks
    if shapes.whole_logits:
        yield (
            "without --whole_logits, if training computes the loss in chunks",
            shapes.with_config(config, whole_logits=False),
            engine,
            ranks,
        )
    # The settings of zero3_offload.json, whatever the engine file of the planned run has.
    by_layer = replace(engine.bounds, by_layer=True, persistent=SHARDED)
    away = replace(engine, bounds=by_layer, parameters="cpu", optimizer="cpu")
    away = replace(away, hpz=1, nvme_buffers=0, pinned=True)
    if ranks.on_gpu and away != engine:
        yield "--ds_config zero3_offload", shapes, away, ranks
    largest = max(s.out_features * s.in_features for s in shapes.run_context.sites)
    if ranks.world_size > 1 and engine.bounds.persistent >= largest:  # a base that is whole
        shared = replace(engine.bounds, persistent=SHARDED)
        yield "--ds_config zero3", shapes, replace(engine, bounds=shared), ranks
    if engine.hpz > 1:
        yield (
            "zero_hpz_partition_size: 1 in the engine file (no second copy of the shards)",
            shapes,
            replace(engine, hpz=1),
            ranks,
        )
    single = replace(engine, bounds=replace(engine.bounds, one_by_one=True))
    if ranks.world_size > 1 and single != engine:
        yield "stage3_allgather_sequential: true in the engine file", shapes, single, ranks
    double = replace(ranks, world_size=2 * ranks.world_size, nodes=2 * ranks.nodes)
    if not engine.settles_ranks:
        nodes = "2 nodes" if double.nodes == 2 else f"{double.nodes} nodes"
        yield f"{double.world_size} ranks on {nodes}", shapes, engine, double
    if words and ranks.on_gpu:
        what = "--ds_config zero3_offload and " + ", ".join(words)
        yield what, shapes.with_config(saving), away, ranks


def _savings(config: Config) -> Iterator[tuple[str, str, str, Any]]:
    """Yield changes of single options that save memory.

    Each is a tuple (text for the user, attribute of ``Config`` that holds the option's section,
    name of the option, new value). Options that already save the memory are left out.
    """
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
