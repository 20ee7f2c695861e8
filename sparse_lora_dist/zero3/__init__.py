"""All code that uses DeepSpeed: sharded parameters, the engine, and offload to CPU or NVMe.

Each parameter is cut into one shard for each rank, and gathered while a module uses it.

Only this folder reads DeepSpeed's private attributes; ``test_zero3_contract.py`` tests each of them
against the installed version.
"""

from sparse_lora_dist.distributed.device import choose_device

# DeepSpeed chooses its accelerator when it is first imported, so this must be set before. A program
# has set it already, by its option --device.
choose_device("auto")
