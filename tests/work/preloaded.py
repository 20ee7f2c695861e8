"""What the fork server of ``tests/ranks.py`` imports, once for all workers."""

from sparse_lora_dist.system.imports import large_imports

with large_imports():
    import peft  # noqa: F401

    import sparse_lora_dist.train  # noqa: F401
