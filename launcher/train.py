"""Fine-tune a sharded 4-bit language model. ``--help`` lists the common options.

deepspeed launcher/train.py --ds_config ds_configs/zero3.json
"""

import sys
from pathlib import Path

# So that it works from a clone that is not installed: sys.path has the script's folder only.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sparse_lora_dist.config.config import Config
from sparse_lora_dist.config.load import load_config
from sparse_lora_dist.distributed.launch import this_launch
from sparse_lora_dist.runtime.entry_point import run_program
from sparse_lora_dist.system.imports import large_imports


def main(config: Config) -> None:
    """Train, or check the checkpoints of ``--verify``."""
    # Imported late, so that --help and a wrong option need not wait for transformers and DeepSpeed.
    if config.run.verify is not None:
        from sparse_lora_dist.checkpoint.verify import verify

        verify(Path(config.run.verify))
        return
    this_launch().check_address()  # before torch asks for it, for minutes
    with large_imports():
        from sparse_lora_dist.train import run

    run(config)


if __name__ == "__main__":
    run_program(sys.argv[1:], load_config, main)
