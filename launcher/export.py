"""Export the adapter of a run as files that other tools open. ``--help`` lists every option.

python launcher/export.py runs/default --output exported
"""

import sys
from pathlib import Path

# A script's own folder is on sys.path, the repository is not; add it, so that a clone works
# without installation.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sparse_lora_dist.export.export_options import ExportRequest, load_request
from sparse_lora_dist.runtime.entry_point import run_program
from sparse_lora_dist.system.imports import large_imports


def main(request: ExportRequest) -> None:
    """Export what the request asks for."""
    # Imported here, so that --help and option errors need not wait for transformers and DeepSpeed.
    with large_imports():
        from sparse_lora_dist.export.export_command import export

    export(request)


if __name__ == "__main__":
    run_program(sys.argv[1:], load_request, main)
