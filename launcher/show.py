"""What is in an adapter or a checkpoint: modules, ranks, density, bytes, norm of the update.

python launcher/show.py runs/default/adapter
"""

import sys
from pathlib import Path

# Works from a plain clone too: a script's own folder is on sys.path, the repository is not.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sparse_lora_dist.runtime.entry_point import run_program
from sparse_lora_dist.show.show_options import ShowRequest, load_request


def main(request: ShowRequest) -> None:
    """Hand over."""
    # Late, so that --help and a wrong option need not wait for torch.
    from sparse_lora_dist.show.show_command import show

    show(request)


if __name__ == "__main__":
    run_program(sys.argv[1:], load_request, main)
