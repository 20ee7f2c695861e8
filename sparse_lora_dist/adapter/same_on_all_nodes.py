"""Check that all nodes have the same adapters, by samples of their tensors.

A name may lead to other files on each node, of which each rank would load its shards.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from math import prod

from sparse_lora_dist.distributed import comm
from sparse_lora_dist.distributed.phases import fail_together
from sparse_lora_dist.errors import UserError
from sparse_lora_dist.zero3.slices import Values

SAMPLES, SAMPLE_ENTRIES = 8, 64
"""Number of samples of each tensor (fewer if it is small), and number of entries of a sample."""


@dataclass(frozen=True, kw_only=True)
class Opened:
    """An adapter whose tensors can be read."""

    name: str
    """The option that names it, with its value."""
    values: Mapping[str, Values]
    """Tensor name -> function (start, stop) that reads entries of the flattened tensor."""
    shapes: Mapping[str, tuple[int, ...]]
    scales: Mapping[str, float] = field(default_factory=dict)
    """Site name -> factor of B A, where it is read from the adapter."""
    classes: Sequence[str] = ()
    """Class names that are stored beside the adapter."""


def check_same_on_all_nodes(adapters: Iterable[Opened]) -> None:
    """Raise UserError if a node's copy of an adapter differs from rank 0's. Collective.

    One rank of each node reads the files of its node.

    Args:
        adapters: the opened adapters; of another rank than the first of its node they are not used.

    Raises:
        UserError: names, shapes, scales or samples of the tensors differ; on every rank.
    """
    own: list[tuple[str, str]] | None = None
    with fail_together("comparing the adapters of all nodes"):
        if comm.rank() == 0 or comm.is_first_on_its_node():
            own = [(adapter.name, fingerprint(adapter)) for adapter in adapters]
    everyone: list[list[tuple[str, str]] | None] = comm.gather_objects(own)
    first = everyone[0]
    assert first is not None
    for rank, other in enumerate(everyone):
        for (name, ours), (_, theirs) in zip(first, other or first, strict=True):
            if ours != theirs:
                raise UserError(
                    f"Not all nodes have the same files of {name}: those of rank {rank} hold other "
                    "tensors or class names than those of rank 0. Copy the same files to every "
                    "machine, or use a shared disk.",
                    shared=True,
                )


def fingerprint(adapter: Opened) -> str:
    """Return a SHA-256 hash, in hex, of an adapter: names, shapes, scales, class names, and
    samples of every tensor. Not a collective."""
    digest = sha256(repr([sorted(adapter.scales.items()), *adapter.classes]).encode())
    for name, shape in sorted(adapter.shapes.items()):
        count = prod(shape)
        digest.update(f"{name} {list(shape)}".encode())
        last = max(count - SAMPLE_ENTRIES, 0)
        for start in sorted({last * i // (SAMPLES - 1) for i in range(SAMPLES)}) if count else ():
            sample = adapter.values[name](start, min(start + SAMPLE_ENTRIES, count))
            digest.update(sample.double().numpy().tobytes())
    return digest.hexdigest()
