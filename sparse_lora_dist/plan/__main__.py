"""``python -m sparse_lora_dist.plan``: the same program as launcher/plan.py."""

from sparse_lora_dist.programs import plan

if __name__ == "__main__":
    plan()
