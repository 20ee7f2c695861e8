"""``python -m sparse_lora_dist.grid``: the same program as launcher/grid.py."""

from sparse_lora_dist.programs import grid

if __name__ == "__main__":
    grid()
