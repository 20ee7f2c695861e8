"""Export the adapter of a run as files that other tools open. ``--help`` lists every option.

python launcher/export.py runs/default --output exported
"""

import sys
from pathlib import Path

# A script's own folder is on sys.path, the repository is not; add it, so that a clone works
# without installation.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sparse_lora_dist.programs import export

if __name__ == "__main__":
    export()
