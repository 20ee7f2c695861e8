"""Print the runs of a sweep, or the options of one; slurm/train_array.sbatch calls it.

python launcher/grid.py slurm/grid.yaml [NUMBER]
"""

import sys
from pathlib import Path

# Needed without an installed package: Python puts launcher/ on sys.path, not the repository.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sparse_lora_dist.config.sweep import load_grid, show
from sparse_lora_dist.runtime.entry_point import run_program

if __name__ == "__main__":
    run_program(sys.argv[1:], load_grid, show)
