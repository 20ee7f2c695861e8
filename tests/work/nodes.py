"""What the workers of ``tests/ranks.py`` run for tests of nodes that are given different things."""

import os
import socket
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch

from sparse_lora_dist.distributed import comm
from sparse_lora_dist.errors import UserError
from tests.work import edit, eval, run


def said(
    program: str, flags: list[list[str]], *, nodes: bool = True, folders: list[Path] | None = None
) -> str:
    """The message of the user error with which a program ends before a weight is read, or "".

    Args:
        program: train, evaluate or edit.
        flags: the command line of each rank.
        nodes: each rank seems to be on a machine of its own.
        folders: the current folder of each rank.
    """
    work = {"train": run.train, "evaluate": eval.evaluate, "edit": edit.edit}[program]
    rank, before = comm.rank(), Path.cwd()
    unread = Unread("the base is read")
    with ExitStack() as patched:
        if nodes:
            patched.enter_context(patch.object(comm, "is_first_on_its_node", lambda: True))
            patched.enter_context(patch.object(socket, "gethostname", lambda: f"n{rank}"))
        where = "sparse_lora_dist.base_model.safetensors_reader.CheckpointFiles.read"
        patched.enter_context(patch(where, side_effect=unread))
        try:
            os.chdir(folders[rank] if folders else before)
            work(flags[rank])
        except Unread:
            return ""
        except UserError as error:
            return str(error)
        finally:
            os.chdir(before)
    raise AssertionError("the program did not read the base")


class Unread(Exception):
    """In place of reading the base."""
