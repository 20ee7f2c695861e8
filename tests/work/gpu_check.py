"""Parts for ``test_gpu_check.py``, and a program that runs them.

    python -m tests.work.gpu_check FOLDER

They end in every way that a part can: rightly, with an exception, with a status, and at its limit
with a child of its own still running.
"""

import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from _gpu_runner import Note, Part, Record, run_parts

HERE = "tests.work.gpu_check"


def right(note: Note, *, tiny: bool, words: str) -> None:
    note(words=words, tiny=tiny)


def raises(note: Note, *, tiny: bool) -> None:
    note(child=subprocess.Popen(["sleep", "600"]).pid)
    raise ValueError("of this part")


def leaves(note: Note, *, tiny: bool) -> None:
    os._exit(3)


def stays(note: Note, *, tiny: bool) -> None:
    child = subprocess.Popen(["sleep", "600"])
    note(child=child.pid)
    time.sleep(600)


def part(name: str, function: Any, **more: Any) -> Part:
    return Part(name=name, work=f"{HERE}:{function.__name__}", **{"limit_s": 60.0} | more)


PARTS = (
    part("raises", raises),
    part("leaves", leaves),
    part("stays", stays, limit_s=4.0),
    part("dear", right, arguments={"words": "never"}, usual_s=1e6),
    part("gpu", right, arguments={"words": "never"}, needs_gpu=True),
    part("right", right, arguments={"words": "said"}),
)


def main(folder: Path) -> None:
    """Run them twice, the second time what is not done."""
    record = Record(folder / "results.jsonl")
    context = multiprocessing.get_context("fork")
    for _ in range(2):
        run_parts(PARTS, record, context, gpu=False, done=record.done(), budget_s=1e5)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
