"""A plan as text for people, and as JSON for programs."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from sparse_lora_dist.distributed.console import counted
from sparse_lora_dist.plan import memory
from sparse_lora_dist.plan.advice import (
    MOST_RANKS,
    Change,
    Limits,
    Need,
    changes,
    need_of,
    smallest_world,
)
from sparse_lora_dist.plan.memory import PHASES, Place, RankMemory, rank_memory
from sparse_lora_dist.plan.plan_options import PlanConfig
from sparse_lora_dist.plan.scenario import PlannedEngine, Ranks, Shapes
from sparse_lora_dist.plan.speed import Speed, speed_of

PLACES: dict[Place, str] = {"gpu": "a GPU", "host": "a rank's host memory"}


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Everything that a plan says."""

    shapes: Shapes
    engine: PlannedEngine
    ranks: Ranks
    plan: PlanConfig

    @property
    def limits(self) -> Limits:
        return Limits(gpu=self.plan.gpu_bytes, host=self.plan.host_bytes)

    @cached_property
    def memory(self) -> RankMemory:
        return rank_memory(self.shapes, self.engine, self.ranks)

    @cached_property
    def need(self) -> Need:
        return need_of(self.shapes, self.engine, self.ranks)

    @property
    def fits(self) -> bool | None:
        """None where there is no limit: ranks on CPUs, and --host_memory not given."""
        if not self.ranks.on_gpu and self.limits.host is None:
            return None
        return self.need.fits(self.limits)

    @cached_property
    def smallest(self) -> int | None:
        return smallest_world(self.shapes, self.engine, self.ranks, self.limits)

    @cached_property
    def changes(self) -> Sequence[Change]:
        return changes(self.shapes, self.engine, self.ranks)

    @property
    def notes(self) -> list[str]:
        """What is to be said of the model, and of the engine file."""
        ignored = [f"{key} of the engine file is ignored" for key in self.engine.not_played]
        return self.shapes.notes + ignored

    @cached_property
    def speed(self) -> Speed:
        return speed_of(self.shapes, self.engine, self.ranks, self.plan)


def gb(size: float) -> str:
    """Bytes in GB of 10^9."""
    return f"{size / 1e9:.2f}"


def as_text(outcome: Outcome) -> str:
    """What a person reads."""
    blocks = [
        _head(outcome),
        *(_table(outcome.memory, place) for place in PLACES),
        "\n".join(_verdict(outcome)),
        "\n".join(_changes(outcome)),
        "\n".join(_speed(outcome)),
        "\n".join(_assumptions(outcome)),
    ]
    return "\n\n".join(block for block in blocks if block)


def _head(outcome: Outcome) -> str:
    config, ranks = outcome.shapes.config, outcome.ranks
    linears = sum(p.in_file for p in outcome.shapes.parameters)
    trained = sum(p.numel for p in outcome.shapes.parameters if p.kind == "trained")
    lines = [
        f"model     {config.model.model}: {linears / 1e9:.2f} B parameters, "
        f"{config.model.quantization}, {config.model.precision}",
        f"adapter   {config.adapter.method} of rank {config.adapter.rank} on "
        f"{counted(len(outcome.shapes.sites), 'linear')}: {trained / 1e6:.1f} M entries",
        f"ranks     {ranks.world_size} on {counted(ranks.nodes, 'node')}; each "
        f"{counted(config.train.micro_batch_size, 'row')} of {config.data.sequence_length} tokens; "
        f"{config.run.ds_config}",
    ]
    return "\n".join(lines)


def _table(found: RankMemory, place: Place) -> str:
    lines = [line for line in found.lines if line.place == place]
    if not lines:
        return ""
    width = max(len(line.label) for line in lines)
    titles = "".join(f"{title:>22}" for title in PHASES.values())
    rows = [f"{'GB of ' + PLACES[place]:<{width}}{titles}"]
    for line in lines:
        cells = "".join(f"{_cell(line.bytes.get(phase, 0)):>22}" for phase in PHASES)
        rows.append(f"{line.label:<{width}}{cells}")
    totals = "".join(f"{gb(found.total(place, phase)):>22}" for phase in PHASES)
    return "\n".join([*rows, f"{'together':<{width}}{totals}"])


def _cell(size: int) -> str:
    if size == 0:
        return "-"
    return gb(size) if size >= 5e6 else f"{size / 1e9:.4f}"


def _verdict(outcome: Outcome) -> Iterator[str]:
    need, limits = outcome.need, outcome.limits
    answer = {True: "fits", False: "DOES NOT FIT", None: "not checked"}[outcome.fits]
    where = []
    if outcome.ranks.on_gpu:
        where.append(f"{gb(need.gpu)} of {gb(limits.gpu)} GB of a GPU")
    total = "" if limits.host is None else f" of {gb(limits.host)}"
    where.append(f"{gb(need.host)}{total} GB of a machine's memory")
    yield f"verdict   {answer}: {', '.join(where)}"
    if outcome.fits is not None:
        least = outcome.smallest
        said = f"no number up to {MOST_RANKS}" if least is None else str(least)
        yield f"least     {said} of such {'GPUs' if outcome.ranks.on_gpu else 'ranks'}"


def _changes(outcome: Outcome) -> Iterator[str]:
    if outcome.fits is not False:
        return
    yield f"to change {'GPU GB':>40}{'machine GB':>14}"
    for change in outcome.changes:
        fits = "   fits" if change.need.fits(outcome.limits) else ""
        yield f"  {change.what}"
        yield f"{gb(change.need.gpu):>50}{gb(change.need.host):>14}{fits}"


def _speed(outcome: Outcome) -> Iterator[str]:
    speed, ranks = outcome.speed, outcome.ranks
    fast, slow = speed.step_s
    yield (
        f"a step    a rank receives {gb(speed.gathered_bytes)} GB of the base, "
        f"{gb(speed.gathered_adapter_bytes)} GB of adapters, {gb(speed.reduced_bytes)} GB of "
        "gradients"
    )
    if ranks.nodes > 1:
        yield f"          {gb(speed.across_nodes_bytes)} GB of it come into a node from others"
    if speed.read_bytes:
        yield f"          a rank reads {gb(speed.read_bytes)} GB of the base from disk"
    yield (
        f"          {fast:.2f} s if traffic hides behind arithmetic, {slow:.2f} s if not: "
        f"{speed.tokens / slow:,.0f} to {speed.tokens / fast:,.0f} tokens/s of all ranks"
    )
    yield f"loading   {gb(speed.file_bytes)} GB to read: {speed.load_s:,.0f} s"
    yield f"saved     {gb(speed.checkpoint_bytes)} GB a checkpoint"


def _assumptions(outcome: Outcome) -> Iterator[str]:
    plan = outcome.plan
    held = "2 bytes a weight" if outcome.shapes.saved is None else "4 bits and scales"
    yield (
        f"assumed   {plan.tflops:g} TFLOP/s a GPU, {plan.network_gb_per_s:g} GB/s to a rank, "
        f"{plan.disk_gb_per_s:g} GB/s from disk to a machine, {held} in the file"
    )
    if outcome.ranks.on_gpu:
        yield (
            f"          {gb(memory.GPU_CONTEXT)} GB of a GPU for CUDA, NCCL and libraries, "
            f"{gb(memory.HOST_PROCESS)} GB of host memory a process; the pool's holes "
            f"{memory.GPU_SLACK:.0%}"
        )
    else:
        yield "          on CPUs glibc keeps holes besides, up to half as much again, unless"
        yield "          MALLOC_MMAP_THRESHOLD_=262144 is set, which costs time"
    if outcome.shapes.config.train.max_steps is None:
        yield "          schedules as in a run of 1,000 steps, since --max_steps is not given"
    for note in outcome.notes:
        yield f"          {note}"


def as_json(outcome: Outcome) -> dict[str, Any]:
    """The same for programs: bytes, seconds; the keys stay as they are."""
    ranks, speed = outcome.ranks, asdict(outcome.speed)
    fast, slow = outcome.speed.step_s
    return {
        "model": outcome.shapes.config.model.model,
        "method": outcome.shapes.config.adapter.method,
        "world_size": ranks.world_size,
        "nodes": ranks.nodes,
        "lines": [asdict(line) for line in outcome.memory.lines],
        "totals": {
            place: {phase: outcome.memory.total(place, phase) for phase in PHASES}
            for place in PLACES
        },
        "need": asdict(outcome.need),
        "limits": asdict(outcome.limits),
        "fits": outcome.fits,
        "smallest_world_size": outcome.smallest,
        "changes": [asdict(c) | {"fits": c.need.fits(outcome.limits)} for c in outcome.changes],
        "speed": speed | {"step_s_overlapped": fast, "step_s_in_turn": slow},
        "assumed": {
            "tflops": outcome.plan.tflops,
            "network_gb_per_s": outcome.plan.network_gb_per_s,
            "disk_gb_per_s": outcome.plan.disk_gb_per_s,
            "gpu_context_bytes": memory.GPU_CONTEXT,
            "gpu_slack": memory.GPU_SLACK,
            "host_process_bytes": memory.HOST_PROCESS,
        },
        "notes": outcome.notes,
    }
