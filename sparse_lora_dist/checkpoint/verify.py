"""``--verify RUN``: are the checkpoints of a run whole?"""

from pathlib import Path

from sparse_lora_dist import checkpoint
from sparse_lora_dist.distributed import comm
from sparse_lora_dist.distributed.console import counted, print_line
from sparse_lora_dist.errors import UserError


def verify(run: Path) -> None:
    """A line for each checkpoint. Every byte of each is read, and nothing is written. Collective.

    Raises:
        UserError: there is none, or one is damaged.
    """
    comm.start()
    folder = run / "checkpoints"
    found = checkpoint.published_for_all(folder)
    if not found:
        raise UserError(f"--verify {run}: {folder} holds no published checkpoint.", shared=True)
    damages = {path: checkpoint.find_damage(path) for path in found}
    for path, damage in damages.items():
        print_line(
            "whole" if damage is None else "damaged", str(path) if damage is None else damage
        )
    num_damaged = sum(damage is not None for damage in damages.values())
    if num_damaged:
        raise UserError(
            f"{num_damaged} of {counted(len(found), 'checkpoint')} damaged. "
            "--resume auto takes the newest whole one.",
            shared=True,
        )
