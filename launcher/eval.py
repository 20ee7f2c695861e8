"""Evaluate a sharded model with or without adapters. ``--help`` lists the common options.

deepspeed launcher/eval.py --model M --adapter runs/mine --eval_data heldout.jsonl --metrics loss
"""

import sys
from pathlib import Path

# A script's own folder is on sys.path, the repository is not; add it, so that a clone works
# without installation.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sparse_lora_dist.distributed.launch import this_launch
from sparse_lora_dist.evaluation.eval_options import EvalRequest, load_request
from sparse_lora_dist.runtime.entry_point import run_program
from sparse_lora_dist.system.imports import large_imports


def main(request: EvalRequest) -> None:
    """Evaluate what the request asks for."""
    this_launch().check_address()  # before torch asks for it, for minutes
    # Imported here, so that --help and option errors need not wait for transformers and DeepSpeed.
    with large_imports():
        from sparse_lora_dist.evaluation.eval_command import evaluate

    evaluate(request)


if __name__ == "__main__":
    run_program(sys.argv[1:], load_request, main)
