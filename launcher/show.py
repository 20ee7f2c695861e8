"""Print the modules of an adapter or a checkpoint: rank, density, bytes, norm of the update.

python launcher/show.py runs/default/adapter
"""

import sys
from pathlib import Path

# A script's own folder is on sys.path, the repository is not; add it, so that a clone works
# without installation.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sparse_lora_dist.programs import show

if __name__ == "__main__":
    show()
