"""Fine-tune a sharded 4-bit language model. ``--help`` lists every option.

deepspeed launcher/train.py --ds_config ds_configs/zero3.json
"""

import sys
from pathlib import Path

# Works from a plain clone too: a script's own folder is on sys.path, the repository is not.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sparse_lora_dist.command_line import load_config
from sparse_lora_dist.program import run_program


def main() -> None:
    """Read the options, then hand over."""
    config = load_config(sys.argv[1:])
    # Late, so that --help and a wrong option answer at once: this imports torch, transformers and
    # DeepSpeed.
    from sparse_lora_dist.train import run

    run(config)


if __name__ == "__main__":
    run_program(main, debug="--debug" in sys.argv)
