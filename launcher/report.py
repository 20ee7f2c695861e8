"""What a run did, on one page without a network; several runs are compared. ``--help`` says more.

python launcher/report.py runs/default [RUN ...] [--png] [--output FILE]
"""

import sys
from pathlib import Path

# Works from a plain clone too: a script's own folder is on sys.path, the repository is not.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sparse_lora_dist.report.report_options import ReportRequest, load_request
from sparse_lora_dist.runtime.entry_point import run_program


def main(request: ReportRequest) -> None:
    """Hand over."""
    # Late, so that --help and a wrong option need not wait for torch and matplotlib.
    from sparse_lora_dist.report.report_command import report

    report(request)


if __name__ == "__main__":
    run_program(sys.argv[1:], load_request, main)
