"""Bytes of one rank while it loads: its shares, and what is on its way from the files."""

from sparse_lora_dist.base_model import nf4
from sparse_lora_dist.plan.playback.parameters import shard_bytes
from sparse_lora_dist.plan.scenario import Shapes

SCALE_VECTORS = 4
"""fp32 vectors of all scales of a weight: gathered, joined, less their mean, in 8 bits."""


def base_shard_bytes(shapes: Shapes, world_size: int) -> int:
    """Of the frozen base on one rank."""
    frozen = [p for p in shapes.parameters if p.kind != "trained"]
    return shard_bytes(frozen, world_size, shapes.itemsize)


def load_peak_bytes(shapes: Shapes, world_size: int) -> int:
    """The most that a rank holds while the base and the adapters are loaded."""
    shares = shard_bytes(shapes.parameters, world_size, shapes.itemsize)
    return shares + load_work(shapes, world_size)


def load_work(shapes: Shapes, world_size: int) -> int:
    """What the load's peak has beyond all shares.

    Parameters come one after another: to the shares so far come this one, its part of the file, the
    part that is read ahead for the next, and the scales of all of a weight that is quantised.
    """
    held, most = 0, 0
    coming = [p for p in shapes.parameters if p.file_bytes]
    parts = [-(-p.file_bytes // world_size) for p in coming]
    ahead = dict(
        zip((p.name for p in coming), zip(parts, [*parts[1:], 0], strict=True), strict=True)
    )
    # Adapters come when the base stands.
    for parameter in sorted(shapes.parameters, key=lambda p: p.kind == "trained"):
        held += parameter.share(world_size) * shapes.itemsize
        work = sum(ahead.get(parameter.name, (0, 0)))
        if parameter.kind == "packed" and shapes.saved is None:
            work += SCALE_VECTORS * 4 * parameter.in_file // nf4.BLOCK
        most = max(most, held + work)
    return max(0, most - held)
