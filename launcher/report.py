"""Write a report of a run as one HTML page, or compare several runs. ``--help`` lists all options.

python launcher/report.py runs/default [RUN ...] [--png] [--output FILE]
"""

import sys
from pathlib import Path

# Needed without an installed package: Python puts launcher/ on sys.path, not the repository.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sparse_lora_dist.report.report_options import ReportRequest, load_request
from sparse_lora_dist.runtime.entry_point import run_program
from sparse_lora_dist.system.imports import large_imports


def main(request: ReportRequest) -> None:
    # Imported here so that --help and wrong options need not wait for torch and matplotlib.
    with large_imports():
        from sparse_lora_dist.report.report_command import report

    report(request)


if __name__ == "__main__":
    run_program(sys.argv[1:], load_request, main)
