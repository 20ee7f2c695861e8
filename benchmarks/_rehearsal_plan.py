"""What ``rehearsal_70b.py`` should find, from shapes alone."""

from math import prod

from sparse_lora_dist.base_model import nf4
from sparse_lora_dist.base_model.architecture import output_head
from sparse_lora_dist.base_model.shard_loader import is_plain_linear
from sparse_lora_dist.methods.base import Method
from sparse_lora_dist.model import DTYPES, Model

SCALE_VECTORS = 4
"""fp32 vectors of all scales of a weight: gathered, joined, less their mean, in 8 bits."""


def planned(model: Model, method: Method, ranks: int) -> tuple[int, int]:
    """(bytes of the base's shard, most bytes while loading) of a rank; ``model`` is only opened."""
    itemsize, head = DTYPES["bf16"].itemsize, output_head(model.module)

    def share(num_bytes: int) -> int:
        elements = -(-num_bytes // itemsize)
        return -(-elements // ranks) * itemsize

    shard, work = 0, 0
    for name, module in model.module.named_modules():
        for parameter in module.parameters(recurse=False):
            own = share(parameter.numel() * itemsize)
            if is_plain_linear(module) and name != head:
                rows, columns = parameter.shape
                layout = nf4.Layout(shape=(rows, columns), double_quant=True)
                shard += share(layout.packed_bytes) + share(layout.scale_bytes)
                # This one and the next, as the files have them.
                work = max(work, 2 * own + SCALE_VECTORS * 4 * layout.num_blocks)
            else:
                shard += own
    adapter = sum(
        share(prod(spec.shape) * itemsize)
        for site in model.sites
        for spec in method.tensors(site).values()
    )
    return shard, shard + adapter + work
