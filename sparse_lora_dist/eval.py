"""``python -m sparse_lora_dist.eval``: the same program as launcher/eval.py."""

from sparse_lora_dist.programs import evaluate

if __name__ == "__main__":
    evaluate()
