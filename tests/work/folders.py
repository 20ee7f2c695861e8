"""What the workers of ``tests/ranks.py`` run for the tests of whose folder is whose."""

import io
from contextlib import redirect_stdout
from pathlib import Path
from unittest.mock import patch

from sparse_lora_dist.distributed import comm
from sparse_lora_dist.editing.edit_command import purpose_of
from sparse_lora_dist.editing.edit_options import load_request
from sparse_lora_dist.errors import UserError
from sparse_lora_dist.run_folder import lock as run_lock
from sparse_lora_dist.run_folder import shared_by_ranks
from sparse_lora_dist.train import run
from tests.work.run import train


def tried(flags: list[str]) -> str:
    """The main job; what it printed, or the message of the user error that it ended with."""
    try:
        return train(flags)
    except UserError as error:
        return f"error: {error}"


def edited(flags: list[str]) -> str:
    """launcher/edit.py, in the same way."""
    request = load_request(flags)
    with redirect_stdout(io.StringIO()) as out:
        try:
            run(request.config, purpose_of(request))
        except UserError as error:
            return f"error: {error}"
    return out.getvalue()


def shared(folders: list[Path], token: str | None = None) -> str:
    """Take the lock of the run folder, which each rank sees in another place. Return what is said.

    ``token``: in the lock that the other ranks see.
    """
    with patch.object(shared_by_ranks, "PATIENCE_S", 0.3):
        folder = folders[comm.rank()]
        if token is not None and comm.rank() > 0:
            folder.mkdir(exist_ok=True)
            (folder / run_lock.NAME).write_text(token)
        try:
            with run_lock.held(folder), shared_by_ranks.shared_by_all_ranks(folder):
                return "shared"
        except UserError as error:
            return f"error: {error}"
