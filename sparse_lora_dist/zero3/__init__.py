"""Everything that touches DeepSpeed: sharded parameters, the engine, where its shards lie.

Private attributes of DeepSpeed are read here and nowhere else; ``test_zero3_contract.py``
pins each.
"""

import os

import torch

# DeepSpeed looks for its accelerator once, when it is imported first.
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
