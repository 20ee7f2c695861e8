"""Terminal output: labelled lines and a progress bar, printed by rank 0 only."""

import os
import sys
from typing import Any

from tqdm import tqdm

from sparse_lora_dist.distributed import comm
from sparse_lora_dist.distributed.launch import Launch
from sparse_lora_dist.distributed.launch_slurm import tasks_without_srun
from sparse_lora_dist.system.program_names import as_started_here


def print_line(label: str, text: str = "") -> None:
    """Print one line on rank 0, above the progress bar if there is one. Not collective.

    Args:
        label: first word of the line, such as "note", padded to 10 columns. Empty if the line
            continues the one above.
        text: rest of the line.
    """
    if comm.rank() == 0:
        tqdm.write(f"{label:<10}{as_started_here(text)}".rstrip(), file=sys.stdout)
        sys.stdout.flush()


def print_launch(launch: Launch) -> None:
    """Print how the ranks were started, or warn if Slurm expected more of them. Collective.

    Args:
        launch: what ``comm.start`` returned.
    """
    if launch.world_size > 1:
        print_line("launch", launch.in_words(comm.num_nodes()))
    elif launch.launcher == "python" and (text := tasks_without_srun(os.environ, sys.argv[0])):
        print_line("warning", text)


def progress_bar(total: int, done: int) -> Any:
    """Return a tqdm progress bar that counts optimizer steps and is shown on rank 0 only.

    Args:
        total: optimizer steps of the run.
        done: optimizer steps already taken, in an earlier part of a resumed run.
    """
    return tqdm(
        total=total, initial=done, unit="step", disable=comm.rank() != 0, dynamic_ncols=True
    )


def counted(number: int, thing: str) -> str:
    """Return a number with its noun, in the plural unless the number is 1: ``1 rank``, ``2 ranks``.

    Args:
        number: the number.
        thing: the noun in the singular.
    """
    return f"{number:,} {thing}" if number == 1 else f"{number:,} {thing}s"


def megabytes(count: int) -> str:
    """Return a number of bytes as text in MB (10^6 bytes), such as ``3.54 MB``."""
    return f"{count / 1e6:.2f} MB"
