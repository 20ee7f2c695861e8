"""Memory of one rank while the base is loaded: its shards, and temporary buffers."""

from sparse_lora_dist.base_model import nf4
from sparse_lora_dist.plan.playback.parameters import shard_bytes
from sparse_lora_dist.plan.scenario import Shapes

SCALE_VECTORS = 4
"""Vectors with all block scales of a weight that exist at once while they are quantised, counted as
fp32: as gathered, joined, with the mean subtracted, and in 8 bits."""


def base_shard_bytes(shapes: Shapes, world_size: int) -> int:
    """Bytes of the frozen base that one rank holds, padding included."""
    frozen = [p for p in shapes.parameters if p.kind != "trained"]
    return shard_bytes(frozen, world_size, shapes.itemsize)


def load_peak_bytes(shapes: Shapes, world_size: int) -> int:
    """Peak bytes of one rank while the base and the adapters are loaded."""
    shares = shard_bytes(shapes.parameters, world_size, shapes.itemsize)
    return shares + load_work(shapes, world_size)


def load_work(shapes: Shapes, world_size: int) -> int:
    """Bytes by which the peak of loading exceeds all shards together.

    Parameters are loaded one after another. While one is loaded, a rank holds the shards loaded so
    far, this parameter's shard, its part of the file, the part of the next parameter that is read
    ahead, and, if the weight is quantised here, all block scales of the whole weight.
    """
    held, most = 0, 0
    coming = [p for p in shapes.parameters if p.file_bytes]
    parts = [-(-p.file_bytes // world_size) for p in coming]
    ahead = dict(
        zip((p.name for p in coming), zip(parts, [*parts[1:], 0], strict=True), strict=True)
    )
    # Adapters are made after the base is loaded.
    for parameter in sorted(shapes.parameters, key=lambda p: p.kind == "trained"):
        held += parameter.share(world_size) * shapes.itemsize
        work = sum(ahead.get(parameter.name, (0, 0)))
        if parameter.kind == "packed" and shapes.saved is None:
            work += SCALE_VECTORS * 4 * parameter.in_file // nf4.BLOCK
        most = max(most, held + work)
    return max(0, most - held)
