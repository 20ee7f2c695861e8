"""The runs of a sweep, for slurm/train_array.sbatch and for whoever wants to see them.

python launcher/grid.py slurm/grid.yaml [NUMBER]
"""

import sys
from pathlib import Path

# Works from a plain clone too: a script's own folder is on sys.path, the repository is not.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sparse_lora_dist.config.sweep import load_grid, show
from sparse_lora_dist.runtime.entry_point import run_program

if __name__ == "__main__":
    run_program(sys.argv[1:], load_grid, show)
