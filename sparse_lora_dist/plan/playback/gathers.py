"""Simulation of ZeRO-3's gathers in one micro-batch: how much of the model is gathered on a rank at
once, and how much crosses the network.

It follows DeepSpeed's rules of fetching, prefetching and releasing in
runtime/zero/partitioned_param_coordinator.py. Sizes are elements of ZeRO-3 parameters.
"""

from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from sparse_lora_dist.plan.playback.parameters import PlannedParameter


@dataclass(frozen=True, kw_only=True, slots=True)
class Bounds:
    """Limits on gathered parameters, in elements; the defaults are DeepSpeed's."""

    prefetch: int = 50_000_000
    """stage3_prefetch_bucket_size: most elements of one prefetch."""
    live: int = 1_000_000_000
    """stage3_max_live_parameters: most gathered elements for which prefetching goes on."""
    reuse: int = 1_000_000_000
    """stage3_max_reuse_distance: a parameter used again within so many elements is not released."""
    persistent: int = 100_000
    """stage3_param_persistence_threshold: parameters up to this size stay gathered."""
    one_by_one: bool = False
    """stage3_allgather_sequential: is every parameter gathered in an all-gather of its own?"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Gathered:
    """What one micro-batch gathers, in elements."""

    peak: int
    """Most elements that are gathered at once, with the buffers of all-gathers."""
    received: int
    """Elements of frozen parameters that are gathered, the rank's own shard included."""
    received_trained: int
    """Elements of trained parameters that are gathered, the rank's own shard included."""


@dataclass
class _Group:
    """Parameters of one all-gather; its buffer is freed when all of them have been used."""

    size: int
    waiting: set[str]
    """Parameters not used yet, and "" for a buffer that exists beside what was copied out of it."""
    split: bool = False
    """Have the parameters been copied out of the buffer, or did they need none?"""


Visit = tuple[str, bool]
"""(module, True before it runs and False after it ran)."""


@dataclass
class _Coordinator:
    """DeepSpeed's PartitionedParameterCoordinator, with sizes in place of tensors."""

    sizes: Mapping[str, int]
    of_module: Mapping[str, Sequence[str]]
    order: Sequence[str]
    """Modules in the order in which they run, forward and backward."""
    bounds: Bounds
    step: int = 0
    available: set[str] = field(default_factory=set)
    in_flight: dict[str, _Group] = field(default_factory=dict)
    counted: int = 0
    """Elements that DeepSpeed counts against ``bounds.live``: without buffers."""
    whole: int = 0
    """Elements gathered now, with buffers."""
    peak: int = 0
    received: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.queue = deque((p, i) for i, m in enumerate(self.order) for p in self.of_module[m])
        self.fetched_for: dict[str, int] = {}

    def fetch(self, module: str) -> None:
        """Gather what ``module`` needs before it runs, and prefetch for later ones."""
        wanted = self.of_module[module]
        self._gather([p for p in wanted if p not in self.available and p not in self.in_flight])
        for name in wanted:
            self._wait(name)
        new = {p for p in wanted if self.fetched_for.get(p, -1) < self.step}
        while self.queue and new:
            name, used = self.queue.popleft()
            self.fetched_for[name] = used
            new.discard(name)
        self._prefetch()
        self.step += 1

    def _prefetch(self) -> None:
        room = min(self.bounds.live - self.counted, self.bounds.prefetch)
        chosen: list[str] = []
        size = 0
        while self.queue and size < room:
            name, used = self.queue.popleft()
            self.fetched_for[name] = max(self.fetched_for.get(name, -1), used)
            if name not in self.available and name not in self.in_flight and name not in chosen:
                chosen.append(name)
                size += self.sizes[name]
        self._gather(chosen)

    def _gather(self, names: Sequence[str]) -> None:
        if not names:
            return
        group = _Group(size=sum(self.sizes[n] for n in names), waiting=set(names))
        for name in names:
            self.in_flight[name] = group
            self.received[name] = self.received.get(name, 0) + self.sizes[name]
        # A single parameter is gathered in place; several are copied out of one buffer.
        group.split = self.bounds.one_by_one or len(names) == 1
        self.counted += group.size
        self._add(group.size)

    def _wait(self, name: str) -> None:
        group = self.in_flight.get(name)
        if group is None:
            return
        if not group.split:
            group.split = True
            group.waiting.add("")  # the buffer exists beside the copies
            self._add(group.size)
        del self.in_flight[name]
        group.waiting.discard(name)
        self.available.add(name)
        if group.waiting == {""}:
            self._add(-group.size)

    def release(self, module: str) -> None:
        """Release what ``module`` used, unless it is used again within ``bounds.reuse``."""
        going = {p for p in self.of_module[module] if self.fetched_for.get(p, -1) <= self.step}
        passed = 0
        for later in self.order[self.step :]:
            if passed >= self.bounds.reuse or not going:
                break
            for name in self.of_module[later]:
                going.discard(name)
                passed += self.sizes[name]
        for name in self.of_module[module]:
            if name in going and name in self.available:
                self.available.discard(name)
                self.counted -= self.sizes[name]
                self._add(-self.sizes[name])

    def _add(self, size: int) -> None:
        self.whole += size
        self.peak = max(self.peak, self.whole)


def gathered(
    parameters: Sequence[PlannedParameter],
    layers: str,
    bounds: Bounds,
    *,
    once: Collection[str] = (),
    ties: Sequence[tuple[str, str]] = (),
    checkpointing: bool,
) -> Gathered:
    """Simulate the gathers of one micro-batch, with persistent parameters gathered before.

    Args:
        parameters: all parameters of the model, in its order.
        layers: name of the list of the model's layers, such as "model.layers".
        bounds: the limits of the engine file.
        once: names of modules that are not gathered for backward.
        ties: (module, name of a parameter of another module that it uses too), for the output head.
        checkpointing: whether each layer runs again in backward.
    """
    moving = [p for p in parameters if p.numel > bounds.persistent]
    sizes = {p.name: p.numel for p in moving}
    of_module: dict[str, list[str]] = {}
    for parameter in moving:
        of_module.setdefault(parameter.module, []).append(parameter.name)
    for module, name in ties:
        if name in sizes:
            of_module.setdefault(module, []).append(name)
    visits = _visits(list(of_module), once, layers, checkpointing)
    coordinator = _Coordinator(
        sizes=sizes,
        of_module=of_module,
        order=[module for module, begins in visits if begins],
        bounds=bounds,
    )
    for module, begins in visits:
        coordinator.fetch(module) if begins else coordinator.release(module)
    trained = {p.name for p in moving if p.kind == "trained"}
    received = coordinator.received
    return Gathered(
        peak=coordinator.peak,
        received=sum(n for name, n in received.items() if name not in trained),
        received_trained=sum(n for name, n in received.items() if name in trained),
    )


def _visits(
    modules: Sequence[str], once: Collection[str], layers: str, checkpointing: bool
) -> list[Visit]:
    """Order of modules: forward, then backward. With checkpointing, each layer runs forward again
    before its backward."""
    parts: dict[str, list[str]] = {}
    for module in modules:
        if module in once:
            continue
        inside = layers and module.startswith(f"{layers}.")
        part = module[len(layers) + 1 :].split(".")[0] if inside else f"{module}:"
        parts.setdefault(part, []).append(module)
    visits = _pass(modules)
    for part, inner in reversed(parts.items()):
        if checkpointing and not part.endswith(":"):
            visits += _pass(inner)
        visits += _pass(list(reversed(_adapted_first(inner))))
    return visits


def _adapted_first(modules: Sequence[str]) -> list[str]:
    """Put an adapter after its base linear, so that in reversed order it begins before it."""
    swapped = list(modules)
    for i, module in enumerate(modules[:-1]):
        if module.endswith(".") and module == f"{modules[i + 1]}.":
            swapped[i], swapped[i + 1] = swapped[i + 1], swapped[i]
    return swapped


def _pass(modules: Sequence[str]) -> list[Visit]:
    """Visits of one pass. An adapter ("q_proj.") ends after its base linear ("q_proj")."""
    visits: list[Visit] = []
    for i, module in enumerate(modules):
        visits.append((module, True))
        if module.endswith(".") and i + 1 < len(modules) and module == f"{modules[i + 1]}.":
            continue
        visits.append((module, False))
        if i > 0 and modules[i - 1] == f"{module}.":
            visits.append((modules[i - 1], False))
    return visits
