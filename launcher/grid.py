"""Print the runs of a sweep, or the options of one; slurm/train_array.sbatch calls it.

python launcher/grid.py slurm/grid.yaml [NUMBER]
"""

import sys
from pathlib import Path

# A script's own folder is on sys.path, the repository is not; add it, so that a clone works
# without installation.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sparse_lora_dist.programs import grid

if __name__ == "__main__":
    grid()
