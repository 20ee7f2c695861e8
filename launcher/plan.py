"""Plan the memory, traffic and time of a run. ``--help`` lists the common options.

python launcher/plan.py --model assets/plans/llama-3-70b --world_size 8 --gpu_memory 24GB
"""

import sys
from pathlib import Path

# Needed without an installed package: Python puts launcher/ on sys.path, not the repository.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sparse_lora_dist.plan.plan_options import PlanRequest, load_request
from sparse_lora_dist.runtime.entry_point import run_program
from sparse_lora_dist.system.imports import large_imports


def main(request: PlanRequest) -> None:
    # Imported here so that --help and wrong options need not wait for transformers and DeepSpeed.
    with large_imports():
        from sparse_lora_dist.plan.plan_command import plan

    plan(request)


if __name__ == "__main__":
    run_program(sys.argv[1:], load_request, main)
