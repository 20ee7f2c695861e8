"""``python -m sparse_lora_dist.show``: the same program as launcher/show.py."""

from sparse_lora_dist.programs import show

if __name__ == "__main__":
    show()
