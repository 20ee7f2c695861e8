"""Computes the results of a plan when they are first read, and formats them as text or as JSON."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

from sparse_lora_dist.distributed.console import counted
from sparse_lora_dist.plan import memory
from sparse_lora_dist.plan.advice import (
    MAX_RANKS,
    Change,
    Limits,
    Need,
    changes,
    need_of,
    smallest_world,
)
from sparse_lora_dist.plan.host_memory import mem_option
from sparse_lora_dist.plan.memory import PHASES, Place, RankMemory, rank_memory
from sparse_lora_dist.plan.plan_options import PlanConfig
from sparse_lora_dist.plan.scenario import PlannedEngine, Ranks, Shapes
from sparse_lora_dist.plan.speed import Speed, speed_of

LARGEST = 10**12
"""stage3_param_persistence_threshold of ds_configs/whole.json: no tensor has so many elements."""
PLACES: dict[Place, str] = {"gpu": "GB on a GPU", "host": "GB in host memory, per rank"}
"""Memory that a table is about -> its heading. There is one table for each."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A planned run with its results, each computed when it is first read."""

    shapes: Shapes
    """The model, its adapters and the options of the run."""
    engine: PlannedEngine
    """Memory settings of the engine file, which is the DeepSpeed JSON file."""
    ranks: Ranks
    """Number of ranks and of machines, and whether the ranks have GPUs."""
    plan: PlanConfig
    """Options of the planner."""

    @property
    def limits(self) -> Limits:
        """Memory of one GPU and of one machine, from the planner's options."""
        return Limits(gpu=self.plan.gpu_bytes, host=self.plan.host_bytes)

    @cached_property
    def memory(self) -> RankMemory:
        """Memory table of the rank that needs most."""
        return rank_memory(self.shapes, self.engine, self.ranks)

    @cached_property
    def need(self) -> Need:
        """Peak memory of the run on one GPU and on one machine."""
        return need_of(self.shapes, self.engine, self.ranks)

    @property
    def fits(self) -> bool | None:
        """True if the run fits into ``limits``, False if not. None if there is no limit, which is
        so for ranks on CPUs without ``--host_memory``."""
        if not self.ranks.on_gpu and self.limits.host is None:
            return None
        return self.need.fits(self.limits)

    @cached_property
    def smallest(self) -> int | None:
        """Smallest number of ranks on which the run fits into ``limits``; None if it fits on no
        number that is tried (see ``smallest_world``)."""
        return smallest_world(self.shapes, self.engine, self.ranks, self.limits)

    @cached_property
    def changes(self) -> Sequence[Change]:
        """Changes of settings that may save memory, by the GPU memory needed, least first."""
        return changes(self.shapes, self.engine, self.ranks)

    @cached_property
    def whole(self) -> "Outcome | None":
        """The run with a base that is whole on every rank (ds_configs/whole.json). None if it is
        planned so, if that does not fit, or if nothing is gathered anyway."""
        bounds = replace(self.engine.bounds, persistent=LARGEST)
        other = replace(self, engine=replace(self.engine, bounds=bounds))
        sharded = self.ranks.world_size > 1 and self.engine.parameters == "none"
        return other if sharded and other.engine != self.engine and other.fits else None

    @property
    def notes(self) -> list[str]:
        """Sentences for the user: where a Llama is planned in place of the model, and which keys of
        the engine file change the memory but are ignored by the plan."""
        ignored = [
            f"the plan does not take {key} of the engine file into account"
            for key in self.engine.not_played
        ]
        return self.shapes.notes + ignored

    @cached_property
    def speed(self) -> Speed:
        """Traffic and time of an optimizer step, of loading and of saving."""
        return speed_of(self.shapes, self.engine, self.ranks, self.plan)


def gb(size: float) -> str:
    """Return ``size`` bytes as a number of GB (10^9 bytes) with two decimals, without a unit."""
    return f"{size / 1e9:.2f}"


def as_text(outcome: Outcome) -> str:
    """Return a plan as text for the terminal.

    Its blocks are: the model, the adapters and the ranks; a table of GPU memory and one of host
    memory; whether the run fits; if it does not, changes that save memory; traffic and time; and
    what the plan assumes.
    """
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
        f"ranks     {ranks.world_size} on {counted(ranks.nodes, 'node')}; micro-batch of "
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
    rows = [f"{PLACES[place]:<{width}}{titles}"]
    for line in lines:
        cells = "".join(f"{_cell(line.bytes.get(phase, 0)):>22}" for phase in PHASES)
        rows.append(f"{line.label:<{width}}{cells}")
    totals = "".join(f"{gb(found.total(place, phase)):>22}" for phase in PHASES)
    return "\n".join([*rows, f"{'total':<{width}}{totals}"])


def _cell(size: int) -> str:
    if size == 0:
        return "-"
    return gb(size) if size >= 5e6 else f"{size / 1e9:.4f}"


def _verdict(outcome: Outcome) -> Iterator[str]:
    need, limits = outcome.need, outcome.limits
    answer = {True: "fits", False: "DOES NOT FIT", None: "not checked"}[outcome.fits]
    where = []
    if outcome.ranks.on_gpu:
        where.append(f"{gb(need.gpu)} of {gb(limits.gpu)} GB on each GPU")
    total = "" if limits.host is None else f" of {gb(limits.host)}"
    where.append(f"{gb(need.host)}{total} GB of host memory per machine")
    yield f"verdict   {answer}: {', '.join(where)}"
    if outcome.fits is not None:
        least = outcome.smallest
        things = "such GPUs" if outcome.ranks.on_gpu else "such ranks"
        if least is None:
            yield f"least     it does not fit on up to {MAX_RANKS} {things}"
        else:
            yield f"least     {least} {things}"
    if (whole := outcome.whole) is not None:
        yield "whole     --ds_config whole, a base that every rank has whole, fits too:"
        yield from _whole(outcome, whole)
    yield f"slurm     sbatch {mem_option(need.host)} asks for this host memory, and a tenth more"


def _whole(outcome: Outcome, whole: Outcome) -> Iterator[str]:
    on_gpu = f"{gb(whole.need.gpu)} GB a GPU, " if outcome.ranks.on_gpu else ""
    machine = f"          {on_gpu}{gb(whole.need.host)} GB per machine"
    if (now := outcome.speed.step_s) is None or (then := whole.speed.step_s) is None:
        yield f"{machine}, and nothing of the base to receive in a step"
    else:
        yield f"{machine}, and {1 - then[1] / now[1]:.0%} less time a"
        yield "          step where communication does not overlap with compute"


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
    yield (
        f"a step    a rank receives {gb(speed.gathered_bytes)} GB of the base, "
        f"{gb(speed.gathered_adapter_bytes)} GB of adapters, {gb(speed.reduced_bytes)} GB of "
        "gradients"
    )
    if ranks.nodes > 1:
        across = gb(speed.across_nodes_bytes)
        yield f"          of this, {across} GB come into a node from other nodes"
    if speed.read_bytes:
        yield f"          a rank reads {gb(speed.read_bytes)} GB of the base from disk"
    if speed.step_s is None:
        yield "          no time of a step: how fast these CPUs compute is not known (--tflops)"
    else:
        fast, slow = speed.step_s
        yield (
            f"          {fast:.2f} s if communication overlaps with compute, {slow:.2f} s if not: "
            f"{speed.tokens / slow:,.0f} to {speed.tokens / fast:,.0f} tokens/s on all ranks"
        )
    yield f"loading   {gb(speed.file_bytes)} GB to read: {speed.load_s:,.0f} s"
    yield f"saved     {gb(speed.checkpoint_bytes)} GB per checkpoint"


def _assumptions(outcome: Outcome) -> Iterator[str]:
    plan = outcome.plan
    of_floats = f"{outcome.shapes.file_itemsize} bytes per weight"
    held = of_floats if outcome.shapes.saved is None else "4 bits and scales"
    rate = "" if plan.rate is None else f"{plan.rate:g} TFLOP/s per GPU, "
    yield (
        f"assumed   {rate}{plan.network_gb_per_s:g} GB/s to a rank, "
        f"{plan.disk_gb_per_s:g} GB/s from disk to a machine, {held} in the base files"
    )
    if outcome.ranks.on_gpu:
        yield (
            f"          {gb(memory.GPU_CONTEXT)} GB per GPU for CUDA, NCCL and libraries, "
            f"{gb(memory.HOST_PROCESS)} GB of host memory per process, "
            f"{memory.GPU_SLACK:.0%} fragmentation of PyTorch's allocator"
        )
    else:
        yield (
            f"          {gb(memory.import_bytes())} GB per process for Python and its packages, "
            f"{memory.HEAP_SLACK:.0%} fragmentation of glibc's heap;"
        )
        yield "          MALLOC_MMAP_THRESHOLD_=262144 prevents that, at a cost in time"
    if outcome.shapes.config.train.max_steps is None:
        yield "          schedules of a run of 1,000 steps, because --max_steps is not given"
    for note in outcome.notes:
        yield f"          {note}"


def as_json(outcome: Outcome) -> dict[str, Any]:
    """Return a plan as a dict for ``json.dumps``, with sizes in bytes and times in seconds.

    Programs read this output, so its keys must not change.
    """
    ranks, speed = outcome.ranks, asdict(outcome.speed)
    fast, slow = outcome.speed.step_s or (None, None)
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
            "tflops": outcome.plan.rate,
            "network_gb_per_s": outcome.plan.network_gb_per_s,
            "disk_gb_per_s": outcome.plan.disk_gb_per_s,
            "gpu_context_bytes": memory.GPU_CONTEXT,
            "gpu_slack": memory.GPU_SLACK,
            "host_process_bytes": memory.HOST_PROCESS,
        },
        "notes": outcome.notes,
    }
