"""Program of launcher/show.py: prints a table of an adapter's or a checkpoint's modules."""

from pathlib import Path

from safetensors import SafetensorError

from sparse_lora_dist.adapter.peft_config import CONFIG
from sparse_lora_dist.checkpoint.manifest import MANIFEST
from sparse_lora_dist.errors import UserError
from sparse_lora_dist.export.trained_run import Trained
from sparse_lora_dist.run_folder.description import RUN_YAML
from sparse_lora_dist.show import checkpoint_table as checkpoint
from sparse_lora_dist.show import peft_table as peft_adapter
from sparse_lora_dist.show.show_options import ShowRequest
from sparse_lora_dist.show.table import table
from sparse_lora_dist.system.machine_errors import of_path
from sparse_lora_dist.system.small_files import refuse_pipes_in

DAMAGE = (OSError, SafetensorError, LookupError, ArithmeticError, ValueError, RuntimeError)
"""Exceptions that reading damaged files, or files of another program, may raise."""


def show(request: ShowRequest) -> None:
    """Print a table of an adapter or a checkpoint: a line for each trained module, with its rank,
    density, bytes and the norm of its update, and a line with totals.

    Args:
        request: the options of the program, which name the folder.

    Raises:
        UserError: if the folder is neither an adapter nor a checkpoint, or is damaged.
    """
    print(as_text(request.path))


def as_text(path: Path) -> str:
    """Return the table that ``show`` prints, below a line that says what the folder holds.

    Args:
        path: the folder of a PEFT adapter or of a checkpoint.

    Raises:
        UserError: if the folder is neither an adapter nor a checkpoint, or is damaged.
    """
    try:
        refuse_pipes_in(path)
        if (path / CONFIG).exists():
            config = peft_adapter.read_config(path)
            head, found = peft_adapter.head(path, config), peft_adapter.modules(path, config)
        elif (path / MANIFEST).exists():
            saved = Trained.open(path)
            head, found = checkpoint.head(saved), checkpoint.modules(saved)
        else:
            raise _neither(path)
        return f"{head}\n{table(list(found))}"
    except DAMAGE as error:
        if (said := of_path(error)) is not None:
            raise UserError(said) from error
        raise UserError(
            f"{path} is damaged: {error!r}. Give another checkpoint, or export the adapter again."
        ) from error


def _neither(path: Path) -> UserError:
    """Return the error for a folder that is neither an adapter nor a checkpoint."""
    if not path.is_dir():
        return UserError(f"{path} is not a folder. Give the folder of an adapter or a checkpoint.")
    if (path / RUN_YAML).exists():
        return UserError(
            f"{path} is a run folder. Give {path}/adapter for its adapter, or "
            f"{path}/checkpoints/step_... for one of its checkpoints."
        )
    return UserError(
        f"{path} is neither an adapter (it has no {CONFIG}) nor a checkpoint (it has no "
        f"{MANIFEST}). Give the folder of either."
    )
