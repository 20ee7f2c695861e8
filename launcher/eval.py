"""Evaluate a sharded model with or without adapters. ``--help`` lists the common options.

deepspeed launcher/eval.py --model M --adapter runs/mine --eval_data heldout.jsonl --metrics loss
"""

import sys
from pathlib import Path

# A script's own folder is on sys.path, the repository is not; add it, so that a clone works
# without installation.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sparse_lora_dist.programs import evaluate

if __name__ == "__main__":
    evaluate()
