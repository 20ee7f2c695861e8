"""Print the modules of an adapter or a checkpoint: rank, density, bytes, norm of the update.

python launcher/show.py runs/default/adapter
"""

import sys
from pathlib import Path

# Needed without an installed package: Python puts launcher/ on sys.path, not the repository.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sparse_lora_dist.runtime.entry_point import run_program
from sparse_lora_dist.show.show_options import ShowRequest, load_request
from sparse_lora_dist.system.imports import large_imports


def main(request: ShowRequest) -> None:
    # Imported here so that --help and wrong options need not wait for torch.
    with large_imports():
        from sparse_lora_dist.show.show_command import show

    show(request)


if __name__ == "__main__":
    run_program(sys.argv[1:], load_request, main)
