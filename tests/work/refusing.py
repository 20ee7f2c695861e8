"""A program whose ranks find a fault: ``python tests/work/refusing.py SLOW_RANK HOW``.

It is started with the variables of a launcher. Rank SLOW_RANK is slower than the others in what HOW
names.
"""

import os
import sys
import time
from collections.abc import Sequence
from typing import NoReturn

from sparse_lora_dist.distributed.launch import this_launch
from sparse_lora_dist.errors import ConfigError, UserError
from sparse_lora_dist.runtime.entry_point import run_program

SLOW_S = 1.5
SLOW, HOW = sys.argv[1] == str(this_launch().rank), sys.argv[2]


class _SlowScreen:
    """A screen on which each line takes its time."""

    def write(self, text: str) -> None:
        os.write(2, b"writing\n")
        time.sleep(SLOW_S)
        os.write(2, text.encode())

    def flush(self) -> None:
        pass


def read(argv: Sequence[str]) -> NoReturn:
    """The ranks read the options, and all or one of them find a fault."""
    if SLOW and HOW == "finding":
        time.sleep(SLOW_S)
    if SLOW and HOW == "writing":
        sys.stderr = _SlowScreen()  # type: ignore[assignment]
    if HOW == "alone":
        if SLOW:
            raise UserError("only this rank knows the reason")
        time.sleep(60)
    if HOW == "another":
        if SLOW:
            time.sleep(SLOW_S)
            raise KeyError("its own traceback")
        raise UserError("rank 1 failed while reading: 'its own traceback'", shared=True)
    raise ConfigError(["the reason"])


def work(config: object) -> NoReturn:
    """Is not reached."""
    raise AssertionError


if __name__ == "__main__":
    run_program(sys.argv[1:], read, work)
