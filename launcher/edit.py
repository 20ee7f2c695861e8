"""Change facts that a language model knows. ``--help`` lists the common options.

deepspeed launcher/edit.py --ds_config ds_configs/zero3.json --model M --edits FILE --number 0:10
"""

import sys
from pathlib import Path

# A script's own folder is on sys.path, the repository is not; add it, so that a clone works
# without installation.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sparse_lora_dist.programs import edit

if __name__ == "__main__":
    edit()
