"""All methods by name.

A new method needs its file in this folder, its line in `METHODS`, its row in ``tests/laws.py``, and
a run of ``docs/generate_methods.py``.
"""

from sparse_lora_dist.methods.adalora import ADALORA
from sparse_lora_dist.methods.cola import COLA
from sparse_lora_dist.methods.increlora import INCRELORA
from sparse_lora_dist.methods.lora import LORA
from sparse_lora_dist.methods.lora_mini import LORA_MINI
from sparse_lora_dist.methods.lorta import LORTA
from sparse_lora_dist.methods.losa import LOSA
from sparse_lora_dist.methods.melora import MELORA
from sparse_lora_dist.methods.mora import MORA
from sparse_lora_dist.methods.neat import NEAT
from sparse_lora_dist.methods.prilora import PRILORA
from sparse_lora_dist.methods.protocol.method import Method, MethodFactory, RunContext
from sparse_lora_dist.methods.pst import PST
from sparse_lora_dist.methods.roselora import ROSELORA
from sparse_lora_dist.methods.sara import SARA
from sparse_lora_dist.methods.sbora import SBORA
from sparse_lora_dist.methods.shira import SHIRA
from sparse_lora_dist.methods.sora import SORA

METHODS: dict[str, MethodFactory] = {
    "lora": LORA,
    "roselora": ROSELORA,
    "sora": SORA,
    "increlora": INCRELORA,
    "adalora": ADALORA,
    "shira": SHIRA,
    "sara": SARA,
    "sbora": SBORA,
    "melora": MELORA,
    "lora_mini": LORA_MINI,
    "mora": MORA,
    "neat": NEAT,
    "prilora": PRILORA,
    "lorta": LORTA,
    "cola": COLA,
    "pst": PST,
    "losa": LOSA,
}

__all__ = ["METHODS", "Method", "MethodFactory", "RunContext"]
