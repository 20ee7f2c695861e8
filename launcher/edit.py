"""Edit facts that a language model knows. ``--help`` lists every option.

deepspeed launcher/edit.py --ds_config ds_configs/zero3.json --model M --edits FILE --number 0:10
"""

import sys
from pathlib import Path

# Works from a plain clone too: a script's own folder is on sys.path, the repository is not.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sparse_lora_dist.editing.edit_options import EditRequest, load_request
from sparse_lora_dist.runtime.entry_point import run_program


def main(request: EditRequest) -> None:
    """Hand over."""
    if request.options.only_read:
        print(request.file.report())
        return
    # Late, so that --help and a wrong option need not wait for transformers and DeepSpeed.
    from sparse_lora_dist.editing.edit_command import purpose_of
    from sparse_lora_dist.train import run

    run(request.config, purpose_of(request))


if __name__ == "__main__":
    run_program(sys.argv[1:], load_request, main)
