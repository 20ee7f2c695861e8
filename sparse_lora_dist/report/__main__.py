"""``python -m sparse_lora_dist.report``: the same program as launcher/report.py."""

from sparse_lora_dist.programs import report

if __name__ == "__main__":
    report()
