"""Simulation of ZeRO-3's all-gathers of parameters in forward and backward of one micro-batch on
one rank.

It computes the largest number of elements that are gathered at once, and the number that is
gathered in all. It fetches, prefetches and releases parameters by DeepSpeed's rules
(runtime/zero/partitioned_param_coordinator.py). All sizes are numbers of elements.
"""

from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from sparse_lora_dist.plan.playback.parameters import PlannedParameter


@dataclass(frozen=True, kw_only=True, slots=True)
class Bounds:
    """Settings of an engine file (DeepSpeed JSON file) that limit which parameters are gathered.

    Sizes are numbers of elements; the defaults are DeepSpeed's.
    """

    prefetch: int = 50_000_000
    """stage3_prefetch_bucket_size: a prefetch ends once it has this many elements."""
    live: int = 1_000_000_000
    """stage3_max_live_parameters: no prefetch begins while this many elements are gathered."""
    reuse: int = 1_000_000_000
    """stage3_max_reuse_distance: a parameter stays gathered if it is used again before later
    modules have used this many elements."""
    persistent: int = 100_000
    """stage3_param_persistence_threshold: parameters up to this size stay gathered."""
    one_by_one: bool = False
    """stage3_allgather_sequential: True if every parameter is gathered by an all-gather of its
    own."""
    by_layer: bool = True
    """True if a layer's parameters are gathered together, False if each module gathers its own
    (``zero3.layers.gather_by_layer``)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Gathered:
    """Numbers of elements that forward and backward of one micro-batch gather on one rank."""

    peak: int
    """Largest number of elements that exist at once: gathered parameters, and buffers of
    all-gathers."""
    received: int
    """Elements of frozen parameters, counted at every all-gather, the rank's own shard included."""
    received_trained: int
    """Elements of trained parameters, counted at every all-gather, the rank's own shard
    included."""


@dataclass
class _Group:
    """One all-gather of one or several parameters.

    Several parameters are gathered in one buffer, unless ``bounds.one_by_one``. When a module first
    waits for one of them, all are copied out. The buffer is freed once each has been waited for.
    """

    size: int
    """Number of elements of all its parameters together."""
    waiting: set[str]
    """Names of its parameters that no module has waited for yet. It also holds the name "" while
    the buffer exists beside the copies."""
    split: bool = False
    """True if the parameters have memory of their own: copied out of the buffer, or gathered
    without one."""


Visit = tuple[str, bool]
"""Call of a ZeRO-3 hook: (name of a module, True for the hook before the module runs, which
gathers, or False for the hook after it ran, which releases)."""


@dataclass
class _Coordinator:
    """DeepSpeed's PartitionedParameterCoordinator, with sizes in place of tensors."""

    sizes: Mapping[str, int]
    """Number of elements of each parameter, by its name."""
    of_module: Mapping[str, Sequence[str]]
    """Names of the parameters that a module uses, by the module's name."""
    order: Sequence[str]
    """Names of modules in the order in which they run, forward and then backward. A module that
    runs several times is listed several times."""
    bounds: Bounds
    """Limits of the engine file on gathered parameters."""
    step: int = 0
    """Index in ``order`` of the module that runs next."""
    available: set[str] = field(default_factory=set)
    """Names of gathered parameters."""
    in_flight: dict[str, _Group] = field(default_factory=dict)
    """All-gathers that no module has waited for yet: name of a parameter -> its all-gather."""
    counted: int = 0
    """Elements that DeepSpeed counts against ``bounds.live``; it does not count buffers."""
    whole: int = 0
    """Elements that are gathered now, buffers included."""
    peak: int = 0
    """Highest value of ``whole`` so far."""
    received: dict[str, int] = field(default_factory=dict)
    """Elements gathered so far, by the parameter's name."""

    def __post_init__(self) -> None:
        self.queue = deque((p, i) for i, m in enumerate(self.order) for p in self.of_module[m])
        self.fetched_for: dict[str, int] = {}

    def fetch(self, module: str) -> None:
        """Gather the parameters of ``module``, which runs next, and prefetch those of modules that
        run later."""
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
        """Release the parameters of ``module``, which has just run.

        A parameter stays gathered if a module uses it again before the modules in between have used
        ``bounds.reuse`` elements.
        """
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
    """Simulate the all-gathers in forward and backward of one micro-batch.

    Parameters of at most ``bounds.persistent`` elements are not counted, because they are gathered
    once before the first step and stay whole.

    Args:
        parameters: all ZeRO-3 parameters of the model, in its order.
        layers: name of the list of the model's layers, such as "model.layers"; "" if it has none.
        bounds: the limits of the engine file.
        once: names of modules that are gathered for forward only, not for backward.
        ties: pairs (name of a module, name of a parameter that it shares with an earlier module),
            such as an output head tied to the embeddings.
        checkpointing: True if each layer runs forward again in backward.

    Returns:
        The largest number of elements that exist at once, and the numbers that are gathered in all.
    """
    moving = [p for p in parameters if p.numel > bounds.persistent]
    sizes = {p.name: p.numel for p in moving}
    modules = {p.module for p in moving}

    def unit_of(module: str) -> str:
        if bounds.by_layer and layers and module.startswith(f"{layers}."):
            return f"{layers}.{module[len(layers) + 1 :].split('.')[0]}"
        return f"{module}." if f"{module}." in modules else module

    of_module: dict[str, list[str]] = {}
    for parameter in moving:
        of_module.setdefault(unit_of(parameter.module), []).append(parameter.name)
    for module, name in ties:
        if name in sizes:
            of_module.setdefault(module, []).append(name)
    again = checkpointing and not bounds.by_layer  # a layer's own hooks do not run again
    visits = _visits(list(of_module), once, layers, again)
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


def _visits(modules: Sequence[str], once: Collection[str], layers: str, again: bool) -> list[Visit]:
    """Return the calls of ZeRO-3's hooks in a micro-batch: those of forward, then of backward.

    With ``again``, each layer has the calls of its forward again before its backward.

    Args:
        modules: names of all modules that have parameters, in the model's order.
        once: names of modules that are left out of backward.
        layers: name of the list of the model's layers; "" if it has none.
        again: True if the hooks of a layer's modules run again in backward, as they do with
            gradient checkpointing.
    """
    parts: dict[str, list[str]] = {}
    for module in modules:
        if module in once:
            continue
        inside = layers and module.startswith(f"{layers}.")
        part = module[len(layers) + 1 :].split(".")[0] if inside else f"{module}:"
        parts.setdefault(part, []).append(module)
    visits = _pass(modules)
    for part, inner in reversed(parts.items()):
        if again and not part.endswith(":"):
            visits += _pass(inner)
        visits += _pass(list(reversed(inner)))
    return visits


def _pass(modules: Sequence[str]) -> list[Visit]:
    """Return the hook calls that ZeRO-3 makes if ``modules`` run once, in this order."""
    return [(module, begins) for module in modules for begins in (True, False)]
