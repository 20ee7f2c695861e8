"""Memory of one rank while the base (the frozen pretrained model) is loaded: the shards that it
keeps, and temporary buffers."""

from sparse_lora_dist.base_model import nf4
from sparse_lora_dist.plan.playback.parameters import shard_bytes
from sparse_lora_dist.plan.scenario import Shapes

SCALE_VECTORS = 4
"""Number of vectors that exist at once while the block scales of a weight are quantised to 8 bits.

Each has an entry for every block, counted as fp32: the scales as gathered, joined into one vector,
with their mean subtracted, and in 8 bits.
"""


def base_shard_bytes(shapes: Shapes, world_size: int) -> int:
    """Return the bytes of one rank's shards of the frozen parameters, padding included.

    ``world_size`` is the number of ranks that each parameter is sharded over.
    """
    frozen = [p for p in shapes.parameters if p.kind != "trained"]
    return shard_bytes(frozen, world_size, shapes.itemsize)


def load_peak_bytes(shapes: Shapes, world_size: int) -> int:
    """Return the peak bytes of one rank while the base is loaded and the adapters are made.

    ``world_size`` is the number of ranks that each parameter is sharded over.
    """
    shares = shard_bytes(shapes.parameters, world_size, shapes.itemsize)
    return shares + load_work(shapes, world_size)


def load_work(shapes: Shapes, world_size: int) -> int:
    """Return by how many bytes one rank's peak while loading exceeds the sum of all its shards.

    ``world_size`` is the number of ranks that each parameter is sharded over. Parameters are loaded
    one after another. While one is loaded, a rank holds:

    - the shards loaded so far, and this parameter's shard;
    - its part of this parameter's bytes in the file;
    - its part of the next parameter's bytes, which is read ahead;
    - if the weight is quantised while it is loaded, the block scales of the whole weight.
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
