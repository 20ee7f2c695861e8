"""``python -m sparse_lora_dist.export``: the same program as launcher/export.py."""

from sparse_lora_dist.programs import export

if __name__ == "__main__":
    export()
