"""One rank of runs on the pretended device.

    python -m tests.pretended_device.run RUNS_JSON REPORT_JSON [MISTAKE]

RUNS_JSON is a list of [program, command line]; the programs are train and eval. Of each run the
report says which problems were found, and launches and waits by phase.
"""

import json
import sys
from pathlib import Path
from typing import Any

from tests.pretended_device import mistakes
from tests.pretended_device.install import install
from tests.pretended_device.modes import modes
from tests.pretended_device.world import world


def main(runs: list[tuple[str, list[str]]], report: Path, mistake: str | None) -> None:
    """Make the runs one after another, and write the report."""
    install()
    from sparse_lora_dist.distributed import comm
    from sparse_lora_dist.runtime.entry_point import exit_process, quiet_others

    quiet_others()
    if mistake is not None:
        mistakes.PLANTED[mistake]()
    found: list[dict[str, Any]] = []
    for program, words in runs:
        world.clear()
        with modes():
            _run(program, words)
        seen = {"problems": world.problems, "launches": world.launches, "waits": world.waits}
        found.append(json.loads(json.dumps(seen)))
    report.with_suffix(f".{comm.rank()}.json").write_text(json.dumps(found))
    exit_process(0)


def _run(program: str, words: list[str]) -> None:
    from sparse_lora_dist import train
    from sparse_lora_dist.config.load import load_config
    from sparse_lora_dist.evaluation.eval_command import evaluate
    from sparse_lora_dist.evaluation.eval_options import load_request

    if program == "train":
        train.run(load_config(words))
    else:
        evaluate(load_request(words))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), Path(sys.argv[2]), (sys.argv[3:] or [None])[0])
