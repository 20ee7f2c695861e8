"""A program whose ranks connect to each other, and do nothing else."""

import sys

from sparse_lora_dist.config.config import Config
from sparse_lora_dist.distributed import comm
from sparse_lora_dist.runtime.entry_point import run_program


def work(config: Config) -> None:
    """Connect, and say so."""
    comm.start(600)
    print("connected", flush=True)


if __name__ == "__main__":
    run_program(sys.argv[1:], lambda argv: Config(), work)
