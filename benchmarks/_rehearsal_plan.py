"""The planner's figures for ``rehearsal_70b.py``, computed from config.json alone."""

import json
from pathlib import Path

from sparse_lora_dist.config.config import Config
from sparse_lora_dist.plan.load_memory import base_shard_bytes
from sparse_lora_dist.plan.memory import rank_memory
from sparse_lora_dist.plan.scenario import PlannedEngine, Ranks
from sparse_lora_dist.plan.shapes import shapes_of


def planned(config: Config, ds_config: str, ranks: int) -> tuple[int, int]:
    """(bytes of the base's shard, most bytes while loading) of a rank on a CPU."""
    shapes, engine = shapes_of(config), PlannedEngine.of(json.loads(Path(ds_config).read_text()))
    memory = rank_memory(shapes, engine, Ranks(world_size=ranks, on_gpu=False))
    return base_shard_bytes(shapes, ranks), memory.total("host", "load")
