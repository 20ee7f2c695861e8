"""Memory table of one rank: a line for each use of memory, and a column for each phase of a run.
The phases are loading, forward and backward, the optimizer step, and saving a checkpoint.

Lines for shards are exact. Lines for activations and gathered weights come from a simulation of a
training step on the meta device (plan/playback). Assumed sizes are constants in this file.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from sparse_lora_dist.base_model.architecture import output_head
from sparse_lora_dist.optim.moments import BLOCK
from sparse_lora_dist.plan.load_memory import load_work
from sparse_lora_dist.plan.playback.parameters import Kind, PlannedParameter, shard_bytes
from sparse_lora_dist.plan.scenario import PlannedEngine, Ranks, Shapes

Phase = Literal["load", "pass", "step", "save"]
"""Part of a run with a column in the table: "load" the base, "pass" (forward and backward), "step"
of the optimizer, "save" a checkpoint."""
Place = Literal["gpu", "host"]
"""Memory that bytes are in: that of the rank's GPU, or host memory."""
PHASES: dict[Phase, str] = {
    "load": "loading",
    "pass": "forward and backward",
    "step": "optimizer step",
    "save": "saving",
}
"""Phase -> heading of its column, in the table's order."""
TRAINED: tuple[Phase, ...] = ("pass", "step", "save")
"""Phases after the base is loaded."""

LOGITS_CHUNK = 2**26
"""Most bytes of the fp32 logits of one chunk, if the loss is computed in chunks of tokens. Three
tensors of this size exist at a time."""

HEAP_SLACK = 0.5
"""Memory that glibc keeps of freed blocks, as a fraction of what forward and backward allocate.
With it a run on 2 CPU ranks needed 1% more than planned, without it 37% more
(benchmarks/plan_check.py)."""

LEAST_SLACK = 120_000_000
"""Bytes that glibc keeps at least, also of a small model: with them a run of the embedded model is
planned 1.9% below to 1.3% above its peak (benchmarks/host_memory.py)."""

GPU_CONTEXT = 1_200_000_000
"""Bytes on a GPU for CUDA's context, workspaces of libraries and NCCL's buffers. This is an
assumption, as the size depends on the GPU."""

GPU_SLACK = 0.05
"""Memory that PyTorch's allocator loses to fragmentation, as a fraction of what forward and
backward allocate. This is an assumption."""

CPU_IMPORTS = 610_000_000
"""Resident bytes of a rank on a CPU before it loads the base: Python, PyTorch, DeepSpeed,
transformers and their libraries. Measured: 0.60 to 0.62 GB, of which 0.44 GB are this rank's alone
and the rest pages of files (benchmarks/host_memory.py)."""

CUDA_IMPORTS = 390_000_000
"""Bytes that such a rank holds more with a build of PyTorch that brings CUDA's libraries. Measured:
1.00 GB against 0.61 GB (benchmarks/host_memory.py with either build)."""

CPU_PROCESS = 100_000_000
"""Bytes that a rank on a CPU allocates besides tensors, after Python and its packages are imported:
data, modules imported later, gloo's buffers, small allocations. Measured: 0.09 to 0.12 GB
(benchmarks/plan_check.py, benchmarks/host_memory.py)."""

HOST_PROCESS = 3_000_000_000
"""Bytes of host memory of a rank with a GPU: Python, PyTorch with CUDA, data. This is an
assumption."""


def import_bytes() -> int:
    """Return the bytes of a rank on a CPU before it loads the base, with this build of PyTorch."""
    return CPU_IMPORTS + (0 if torch.version.cuda is None else CUDA_IMPORTS)


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """One line of the memory table: a use of memory, with its bytes in each phase."""

    key: str
    """Name of the line in JSON."""
    label: str
    """Name of the line in the table."""
    place: Place
    """Memory that the bytes are in: that of the GPU or of the host."""
    bytes: dict[Phase, int]
    """Bytes in each phase; a phase that is left out counts as 0."""


@dataclass(frozen=True, kw_only=True)
class RankMemory:
    """Memory table of one rank."""

    lines: tuple[Line, ...]
    """All lines of the table, of GPU and host memory, in the order in which they are printed."""

    def total(self, place: Place, phase: Phase) -> int:
        """Return the bytes that all lines together take in one phase.

        Args:
            place: "gpu" or "host": the memory whose lines are added up.
            phase: the phase of the run, a key of ``PHASES``.
        """
        return sum(line.bytes.get(phase, 0) for line in self.lines if line.place == place)

    def peak(self, place: Place) -> int:
        """Return the bytes in use in the phase that needs most of the memory ``place``, which is
        "gpu" or "host"."""
        return max(self.total(place, phase) for phase in PHASES)

    def training_peak(self, place: Place) -> int:
        """Return the bytes of the memory ``place``, "gpu" or "host", that training steps need.

        It is the larger of the total in forward and backward, and the total in the optimizer step.
        Loading and saving are left out.
        """
        return max(self.total(place, "pass"), self.total(place, "step"))


def rank_memory(shapes: Shapes, engine: PlannedEngine, ranks: Ranks) -> RankMemory:
    """Return the memory table of the rank that needs most.

    Args:
        shapes: the model, its adapters and the options of the run.
        engine: the memory settings of the engine file, which is the DeepSpeed JSON file.
        ranks: number of ranks and of machines, and whether the ranks have GPUs.

    Returns:
        The table, without lines that are 0 in every phase. If the ranks have no GPUs, all lines are
        in host memory.
    """
    lines = [
        *_base(shapes, engine, ranks),
        *_adapter(shapes, engine, ranks),
        *_working_set(shapes, engine, ranks),
        *_framework(shapes, engine, ranks),
    ]
    return RankMemory(lines=tuple(line for line in lines if any(line.bytes.values())))


def _line(key: str, label: str, place: Place, size: float, *phases: Phase) -> Line:
    return Line(key=key, label=label, place=place, bytes=dict.fromkeys(phases, int(size)))


def _always(key: str, label: str, place: Place, size: float) -> Line:
    return _line(key, label, place, size, *PHASES)


def _device(ranks: Ranks) -> Place:
    return "gpu" if ranks.on_gpu else "host"


FROZEN: dict[Kind, tuple[str, str]] = {
    "packed": ("packed_weights", "base: packed 4-bit weights"),
    "scales": ("scales", "base: block scales"),
    "plain": ("unquantised_linears", "base: linears not quantised (the head)"),
    "embeddings": ("embeddings", "base: embeddings"),
    "rest": ("norms_and_biases", "base: norms, biases"),
    "kept": ("kept", "adapter: kept tensors, never trained"),
}
"""Kind of a parameter that is not trained -> (key of its line, label of its line)."""


def _base(shapes: Shapes, engine: PlannedEngine, ranks: Ranks) -> Iterable[Line]:
    where = _device(ranks)

    def stays(parameter: PlannedParameter) -> bool:
        return engine.parameters == "none" or parameter.numel <= engine.bounds.persistent

    def is_whole(parameter: PlannedParameter) -> bool:  # counted below (``zero3.whole``)
        small = parameter.numel <= engine.bounds.persistent
        return small and ranks.world_size > 1 and parameter.kind not in ("kept", "trained")

    for kind, (key, label) in FROZEN.items():
        parameters = [p for p in shapes.parameters if p.kind == kind and not is_whole(p)]
        staying = [p for p in parameters if stays(p)]
        leaving = [p for p in parameters if not stays(p)]
        yield _always(key, label, where, _share(staying, shapes, ranks))
        if engine.parameters == "nvme" and kind != "kept":  # small shards stay in host memory
            leaving = [p for p in leaving if _share([p], shapes, ranks) < engine.nvme_from]
        offloaded = _offloaded(leaving, shapes, engine, ranks)
        yield _always(key, f"{label}, offloaded", "host", offloaded)
    if ranks.world_size > 1:
        small = [p for p in shapes.parameters if p.numel <= engine.bounds.persistent]
        whole = sum(p.numel for p in small) * shapes.itemsize
        label = "small parameters, whole on every rank"
        yield _line("persistent", label, where, whole, *TRAINED)
    if engine.hpz > 1:
        group = replace(ranks, world_size=engine.hpz)
        frozen = [p for p in shapes.parameters if p.kind != "trained"]
        copies, copy_at = _share(frozen, shapes, group), where
        if engine.parameters == "cpu":
            copies, copy_at = _offloaded(frozen, shapes, engine, group), "host"
        yield _line(
            "hpz_copy", "second copy of the shards in each node (hpZ)", copy_at, copies, *TRAINED
        )
    buffers = engine.nvme_buffers * shapes.itemsize  # pinned by DeepSpeed, not rounded up
    yield _always("nvme_buffers", "pinned buffers for the disk", "host", buffers)


def pinned_block(size: int) -> int:
    """Return the bytes that PyTorch allocates for a pinned tensor of ``size`` bytes: ``size``
    rounded up to a power of two."""
    return 1 << (size - 1).bit_length() if size else 0


def _offloaded(
    parameters: Sequence[PlannedParameter], shapes: Shapes, engine: PlannedEngine, ranks: Ranks
) -> int:
    """Return the bytes that one rank's shards of ``parameters`` take in host memory.

    Each shard is an allocation of its own, which is rounded up if the memory is pinned.
    """
    sizes = [_share([p], shapes, ranks) for p in parameters]
    return sum(map(pinned_block, sizes) if engine.pinned and ranks.on_gpu else sizes)


def _share(parameters: Sequence[PlannedParameter], shapes: Shapes, ranks: Ranks) -> int:
    return shard_bytes(parameters, ranks.world_size, shapes.itemsize)


def trained_entries(shapes: Shapes, ranks: Ranks) -> int:
    """Return the number of trained entries in one rank's shards, live or dead, padding included.

    They are those of adapters and of modules trained in full (``--modules_to_save``).
    """
    return sum(p.share(ranks.world_size) for p in shapes.parameters if p.kind == "trained")


def sparse_entries(shapes: Shapes, ranks: Ranks) -> int:
    """Return the number of trained adapter entries in one rank's shards, live or dead, padding
    included. Modules trained in full are not counted."""
    return sum(p.share(ranks.world_size) for p in shapes.parameters if p.sparse)


def live_entries(shapes: Shapes, ranks: Ranks) -> float:
    """Return the number of entries that have optimizer moments, on the rank with most of them.

    They are all entries of modules trained in full, and the live entries of adapters. Methods may
    make entries of adapters live or dead during a run; the largest number over the run is taken.

    Args:
        shapes: the model, its adapters and the options of the run.
        ranks: the ranks that the entries are sharded over.

    Returns:
        The number, a float because the live fraction is a forecast.
    """
    sparse = sparse_entries(shapes, ranks)
    peak = shapes.forecast.on(ranks.world_size).peak
    return peak * sparse + trained_entries(shapes, ranks) - sparse


def moment_bytes(live: float, entries: int, bits: int, birth_bytes: int) -> float:
    """Return the bytes of the optimizer's moments on one rank.

    A live entry has Adam's two moments and a birth step, the optimizer step after which it came to
    life. Every entry, live or dead, has one bit that says which it is.

    Args:
        live: number of live entries on the rank.
        entries: number of live and dead entries on the rank together.
        bits: bits per moment, 32 or 8. Moments of 8 bits have an fp32 scale per block besides.
        birth_bytes: bytes of a birth step; 0 if all live entries share one birth step.
    """
    each = 8.0 if bits == 32 else 2.0 * (1 + 4 / BLOCK)
    return live * (each + birth_bytes) + -(-entries // 8)


def writes_beside_training(shapes: Shapes) -> bool:
    """Return True if checkpoints are written in the background while training goes on.

    This is so with ``--async_save`` if a checkpoint is due before the last step: every
    ``--save_every`` steps, or at the end of a stage (a part of the run with a learning-rate
    schedule of its own).
    """
    run, stages = shapes.config.run, shapes.method.stages
    return run.async_save and (
        0 < run.save_every < shapes.run_context.total_steps or len(stages) > 1
    )


def saved_bytes(shapes: Shapes, ranks: Ranks) -> int:
    """Return the bytes that one rank writes into a checkpoint.

    Every trained entry is saved as its fp32 master value and one bit (live or dead). An adapter
    entry has the method's fp32 statistics besides, an input feature its fp64 mean square. A live
    entry has two fp32 moments and, unless all live entries share one, a birth step of 4 bytes.
    Tensors that the method keeps are saved as they are.
    """
    entries, birth = trained_entries(shapes, ranks), 4 if shapes.forecast.birth_bytes else 0
    statistics = 4 * shapes.method.n_stats * sparse_entries(shapes, ranks)
    moments = live_entries(shapes, ranks) * (8 + birth)
    kept = _share([p for p in shapes.parameters if p.kind == "kept"], shapes, ranks)
    squares = -(-squares_bytes(shapes) // ranks.world_size)
    return int(4 * entries + entries / 8 + statistics + moments + kept + squares)


def squares_bytes(shapes: Shapes) -> int:
    """Return the bytes of the fp64 mean squares of input features, which every rank has whole; 0
    for a method without them (``Rewriting.squares_decay``)."""
    now = shapes.method.rewriting
    counts = now is not None and now.squares_decay is not None
    return 8 * sum(s.in_features for s in shapes.run_context.sites) if counts else 0


def _adapter(shapes: Shapes, engine: PlannedEngine, ranks: Ranks) -> Iterable[Line]:
    where = _device(ranks)
    copy_at: Place = where if engine.parameters == "none" else "host"
    state_at: Place = where if engine.optimizer == "none" else "host"
    entries = trained_entries(shapes, ranks)
    yield _always("adapter", "adapter: copy that forward uses", copy_at, entries * shapes.itemsize)
    yield _line("master", "adapter: fp32 master", state_at, 4 * entries, *TRAINED)
    yield _line("gradients", "adapter: gradients", state_at, 4 * entries, *TRAINED)
    # Without optimizer offload the optimizer's copy of the gradients exists in the step only.
    during: tuple[Phase, ...] = TRAINED if engine.optimizer == "cpu" else ("step",)
    label = "adapter: gradients, the optimizer's copy"
    yield _line("gradient_copy", label, state_at, 4 * entries, *during)
    future, bits = shapes.forecast, shapes.config.train.moment_bits
    size = moment_bytes(live_entries(shapes, ranks), entries, bits, future.birth_bytes)
    yield _line("moments", "adapter: moments, at their peak", state_at, size, *TRAINED)
    statistics = 4 * shapes.method.n_stats * sparse_entries(shapes, ranks)
    yield _line("statistics", "adapter: statistics", state_at, statistics, *TRAINED)
    if squares := squares_bytes(shapes):
        yield _line("squares", "mean squares of input features", where, squares, *TRAINED)
    label, shares = "base gradients of the first steps", collected_bytes(shapes, ranks)
    whole = max(4 * s.out_features * s.in_features for s in shapes.run_context.sites)
    collected: dict[Phase, int] = {"pass": shares + whole, "step": shares} if shares else {}
    yield Line(key="collected", label=label, place=where, bytes=collected)
    label = "copy of a checkpoint while it is written"
    during = TRAINED if writes_beside_training(shapes) else ("save",)
    yield _line("saved_copy", label, "host", saved_bytes(shapes, ranks), *during)


def collected_bytes(shapes: Shapes, ranks: Ranks) -> int:
    """Return the bytes on one rank of the fp32 gradients of base weights that the method collects
    (``Rewriting.collects_gradient``), in the step that collects most."""
    sites, now = shapes.run_context.sites, shapes.method.rewriting
    if now is None or now.collects_gradient is None:
        return 0
    most = 0
    for step in range(1, shapes.run_context.total_steps + 1):
        collected = [s for i, s in enumerate(sites) if now.collects_gradient(step, i)]
        if not collected:  # the first steps collect
            break
        shares = (-(-s.out_features * s.in_features // ranks.world_size) for s in collected)
        most = max(most, 4 * sum(shares))
    return most


def _working_set(shapes: Shapes, engine: PlannedEngine, ranks: Ranks) -> Iterable[Line]:
    where = _device(ranks)
    # A single rank gathers nothing, unless its parameters are offloaded.
    alone = ranks.world_size == 1 and (engine.parameters == "none" or not ranks.on_gpu)
    bounds = engine.bounds
    if ranks.world_size == 1:  # copied one by one, without a buffer
        bounds = replace(bounds, one_by_one=True)
    whole = 0 if alone else shapes.gathered(bounds).peak * shapes.itemsize
    yield _line("gathered", "weights gathered for use", where, whole, "pass")
    step, config = shapes.step, shapes.config
    label = "activations kept for backward"
    if config.model.gradient_checkpointing:
        label += ", checkpointed"
    yield _line("activations", label, where, step.kept, "pass")
    # The head's gradient exists until backward ends.
    head_gradient = trained_head(shapes) * shapes.itemsize
    peak = max(step.forward, step.backward + head_gradient, step.kept + loss_bytes(shapes))
    work = peak - step.kept
    label = "temporaries of a layer, or logits, with gradients"
    yield _line("work", label, where, work, "pass")
    share, owner = (GPU_SLACK, "PyTorch") if ranks.on_gpu else (HEAP_SLACK, "glibc")
    label, slack = f"fragmentation of {owner}'s allocator (assumed)", whole + step.kept + work
    least = 0 if ranks.on_gpu else LEAST_SLACK
    yield _line("slack", label, where, max(share * slack, least), "pass")
    trained = sum(p.numel for p in shapes.parameters if p.kind == "trained")
    bucket = engine.reduce_bucket
    filled = 4 * min(bucket, trained)
    # On a CPU, pages of the buffer that are never written take no memory.
    size = 4 * bucket if ranks.on_gpu else filled
    label = "gradient buckets, filled and reduced"
    yield _line("buckets", label, where, size + filled, "pass")
    coming = load_work(shapes, ranks.world_size)
    yield _line("load_work", "temporaries while reading the files", where, coming, "load")


def loss_bytes(shapes: Shapes) -> int:
    """Return the bytes that computing the loss takes on one rank; 0 if there is no output head.

    These are the logits with their gradients, and the gradient of the hidden states. If the loss is
    computed in chunks and the head trains, the head's gradient exists three times: as the fp32 sum
    over chunks, as the gradient of one chunk, and as the result.
    """
    head = shapes.model.get_output_embeddings()
    if head is None:
        return 0
    config = shapes.config
    tokens = config.train.micro_batch_size * config.data.sequence_length
    vocabulary, width = (int(n) for n in head.weight.shape)
    hidden = tokens * width * shapes.itemsize
    trained = trained_head(shapes)
    if shapes.whole_logits:
        return hidden + (2 * tokens * vocabulary + trained) * shapes.itemsize
    chunk = min(LOGITS_CHUNK, 4 * tokens * vocabulary)
    return hidden + 3 * chunk + trained * (4 + 2 * shapes.itemsize)


def trained_head(shapes: Shapes) -> int:
    """Return the number of entries of the whole output head if it is trained in full
    (``--modules_to_save``), else 0."""
    head = output_head(shapes.model)
    return sum(p.numel for p in shapes.parameters if p.kind == "trained" and p.module == head)


def _framework(shapes: Shapes, engine: PlannedEngine, ranks: Ranks) -> Iterable[Line]:
    if not ranks.on_gpu:
        yield _always("imports", "Python and its packages (measured)", "host", import_bytes())
        yield _always("process", "data, late imports, gloo (measured)", "host", CPU_PROCESS)
        return
    yield _always("context", "CUDA, NCCL, libraries (assumed)", "gpu", GPU_CONTEXT)
    yield _always("process", "Python process with CUDA (assumed)", "host", HOST_PROCESS)
