"""Every method there is. A new one: its file beside this, its line here, its row in the laws
table."""

from sparse_lora_dist.methods.base import Method, MethodFactory
from sparse_lora_dist.methods.lora import LORA
from sparse_lora_dist.methods.roselora import ROSELORA

METHODS: dict[str, MethodFactory] = {
    "lora": LORA,
    "roselora": ROSELORA,
}

__all__ = ["METHODS", "Method", "MethodFactory"]
