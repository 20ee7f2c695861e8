"""Fine-tune a sharded 4-bit language model. ``--help`` lists the common options.

deepspeed launcher/train.py --ds_config ds_configs/zero3.json
"""

import sys
from pathlib import Path

# A script's own folder is on sys.path, the repository is not; add it, so that a clone works
# without installation.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sparse_lora_dist.programs import train

if __name__ == "__main__":
    train()
