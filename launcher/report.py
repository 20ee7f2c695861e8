"""Write a report of a run as one HTML page, or compare several runs. ``--help`` lists all options.

python launcher/report.py runs/default [RUN ...] [--png] [--output FILE]
"""

import sys
from pathlib import Path

# A script's own folder is on sys.path, the repository is not; add it, so that a clone works
# without installation.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sparse_lora_dist.programs import report

if __name__ == "__main__":
    report()
