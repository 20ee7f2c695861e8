"""What a person at the terminal sees: labelled lines and a progress bar, from rank 0 alone."""

import sys
from typing import Any

from tqdm import tqdm

from sparse_lora_dist.distributed import comm


def print_line(label: str, text: str = "") -> None:
    """One line, above the progress bar where there is one."""
    if comm.rank() == 0:
        tqdm.write(f"{label:<10}{text}".rstrip(), file=sys.stdout)
        sys.stdout.flush()


def progress_bar(total: int, done: int) -> Any:
    """A tqdm bar over optimizer steps."""
    return tqdm(
        total=total, initial=done, unit="step", disable=comm.rank() != 0, dynamic_ncols=True
    )


def counted(number: int, thing: str) -> str:
    """1 rank, 2 ranks."""
    return f"{number:,} {thing}" if number == 1 else f"{number:,} {thing}s"


def megabytes(count: int) -> str:
    """Bytes in MB of 10^6."""
    return f"{count / 1e6:.2f} MB"
