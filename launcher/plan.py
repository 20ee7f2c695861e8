"""Plan the memory, traffic and time of a run. ``--help`` lists the common options.

python launcher/plan.py --model assets/plans/llama-3-70b --world_size 8 --gpu_memory 24GB
"""

import sys
from pathlib import Path

# A script's own folder is on sys.path, the repository is not; add it, so that a clone works
# without installation.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sparse_lora_dist.programs import plan

if __name__ == "__main__":
    plan()
