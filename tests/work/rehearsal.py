"""What workers run for ``test_rehearsal.py``: a real rank, with the figures of a rehearsed one."""

import sys
from pathlib import Path
from typing import Any

from tests.work.base import config_of, load_model

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))


def loaded(folder: str) -> dict[str, int]:
    """Bytes of this rank's shard and adapters, bytes read, a sum over what it made by itself."""
    from rehearsal_70b import packed_sum

    model = load_model(config_of(model=folder))
    held: Any = list(model.module.parameters())
    return {
        "bytes_read": model.files.bytes_read,
        "shard": sum(p.ds_tensor.nbytes for p in held if not p.requires_grad),
        "adapter": sum(p.ds_tensor.nbytes for p in held if p.requires_grad),
        "packed_sum": packed_sum(model),
    }
