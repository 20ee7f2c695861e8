"""How much of the model is whole on a rank at a time, and how much crosses the network: DeepSpeed's
own rules of fetching, prefetching and releasing (runtime/zero/partitioned_param_coordinator.py),
played through one micro-batch.

Lengths count elements of ZeRO-3 parameters.
"""

from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from sparse_lora_dist.plan.playback.parameters import PlannedParameter


@dataclass(frozen=True, kw_only=True, slots=True)
class Bounds:
    """What an engine file sets; the defaults are DeepSpeed's."""

    prefetch: int = 50_000_000
    live: int = 1_000_000_000
    reuse: int = 1_000_000_000
    persistent: int = 100_000
    one_by_one: bool = False
    """Does every parameter come in an exchange of its own (stage3_allgather_sequential)?"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Gathered:
    """Of one micro-batch."""

    peak: int
    """Elements that are whole at a time, at most, and the buffers they come in."""
    received: int
    """Elements gathered, own share included: frozen ones."""
    received_trained: int
    """The same of trained ones."""


@dataclass
class _Group:
    """Parameters that come in one exchange; their buffer lives until all have been asked for."""

    size: int
    waiting: set[str]
    split: bool = False


Visit = tuple[str, bool]
"""(module, does it begin?)"""


@dataclass
class _Coordinator:
    sizes: Mapping[str, int]
    of_module: Mapping[str, Sequence[str]]
    order: Sequence[str]
    """Modules as they begin, forward and backward."""
    bounds: Bounds
    step: int = 0
    available: set[str] = field(default_factory=set)
    flying: dict[str, _Group] = field(default_factory=dict)
    active: set[str] = field(default_factory=set)
    counted: int = 0
    whole: int = 0
    peak: int = 0
    received: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.queue = deque((p, i) for i, m in enumerate(self.order) for p in self.of_module[m])
        self.fetched_for: dict[str, int] = {}

    def fetch(self, module: str) -> None:
        """Before a module runs."""
        wanted = self.of_module[module]
        self._gather([p for p in wanted if p not in self.available and p not in self.flying])
        for name in wanted:
            self.active.add(name)
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
            if name not in self.available and name not in self.flying and name not in chosen:
                chosen.append(name)
                size += self.sizes[name]
        self._gather(chosen)

    def _gather(self, names: Sequence[str]) -> None:
        if not names:
            return
        group = _Group(size=sum(self.sizes[n] for n in names), waiting=set(names))
        for name in names:
            self.flying[name] = group
            self.received[name] = self.received.get(name, 0) + self.sizes[name]
        # One alone comes to its place; several are cut out of a buffer.
        group.split = self.bounds.one_by_one or len(names) == 1
        self.counted += group.size
        self._add(group.size)

    def _wait(self, name: str) -> None:
        group = self.flying.get(name)
        if group is None:
            return
        if not group.split:
            group.split = True
            group.waiting.add("")  # the buffer stands beside what was cut out of it
            self._add(group.size)
        del self.flying[name]
        group.waiting.discard(name)
        self.available.add(name)
        if group.waiting == {""}:
            self._add(-group.size)

    def release(self, module: str) -> None:
        """After it ran: what is not used again soon goes."""
        going = {p for p in self.of_module[module] if self.fetched_for.get(p, -1) <= self.step}
        passed = 0
        for later in self.order[self.step :]:
            if passed >= self.bounds.reuse or not going:
                break
            for name in self.of_module[later]:
                going.discard(name)
                passed += self.sizes[name]
        for name in self.of_module[module]:
            self.active.discard(name)
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
    """Of a micro-batch that finds persistent parameters (``bounds``) whole already.

    Args:
        layers: the name under which the model's layers lie, each of which is run again in backward
            where activations are checkpointed.
        once: modules that have no backward.
        ties: (module, parameter that it uses too): the output head comes last, as it does here.
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
    """Forward, then backward; layer by layer once more forward before, with checkpointing."""
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
    """So that reversed, an adapted linear begins before the linear in it."""
    swapped = list(modules)
    for i, module in enumerate(modules[:-1]):
        if module.endswith(".") and module == f"{modules[i + 1]}.":
            swapped[i], swapped[i + 1] = swapped[i + 1], swapped[i]
    return swapped


def _pass(modules: Sequence[str]) -> list[Visit]:
    """Each begins and ends; what carries an adapter ends after the linear in it."""
    visits: list[Visit] = []
    for i, module in enumerate(modules):
        visits.append((module, True))
        if module.endswith(".") and i + 1 < len(modules) and module == f"{modules[i + 1]}.":
            continue
        visits.append((module, False))
        if i > 0 and modules[i - 1] == f"{module}.":
            visits.append((modules[i - 1], False))
    return visits
