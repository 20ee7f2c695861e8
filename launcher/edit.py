"""Change facts that a language model knows. ``--help`` lists the common options.

deepspeed launcher/edit.py --ds_config ds_configs/zero3.json --model M --edits FILE --number 0:10
"""

import sys
from pathlib import Path

# A script's own folder is on sys.path, the repository is not; add it, so that a clone works
# without installation.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sparse_lora_dist.distributed.launch import this_launch
from sparse_lora_dist.editing.edit_options import EditRequest, load_request
from sparse_lora_dist.runtime.entry_point import run_program
from sparse_lora_dist.system.imports import large_imports


def main(request: EditRequest) -> None:
    """Train and measure the edits, or with --only_read print what the file holds."""
    if request.options.only_read:
        print(request.file.report())
        return
    this_launch().check_address()  # before torch asks for it, for minutes
    # Imported here, so that --help and option errors need not wait for transformers and DeepSpeed.
    with large_imports():
        from sparse_lora_dist.editing.edit_command import purpose_of
        from sparse_lora_dist.train import run

    run(request.config, purpose_of(request))


if __name__ == "__main__":
    run_program(sys.argv[1:], load_request, main)
