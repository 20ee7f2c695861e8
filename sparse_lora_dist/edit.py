"""``python -m sparse_lora_dist.edit``: the same program as launcher/edit.py."""

from sparse_lora_dist.programs import edit

if __name__ == "__main__":
    edit()
