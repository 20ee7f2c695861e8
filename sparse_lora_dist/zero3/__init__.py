"""All code that uses DeepSpeed: sharded parameters, the engine, and offload to CPU or NVMe.

Each parameter is cut into one shard for each rank, and gathered while a module uses it.

Only this folder reads DeepSpeed's private attributes; ``test_zero3_contract.py`` tests each of them
against the installed version.
"""

import os

import torch

# DeepSpeed chooses its accelerator when it is first imported, so this must be set before.
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
