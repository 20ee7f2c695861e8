"""What the workers of ``tests/ranks.py`` run for the tests of whose folder is whose."""

import io
from contextlib import redirect_stdout

from sparse_lora_dist.editing.edit_command import purpose_of
from sparse_lora_dist.editing.edit_options import load_request
from sparse_lora_dist.errors import UserError
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
