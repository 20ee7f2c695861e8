"""``--verify RUN``: check that the checkpoints of a run are intact."""

from pathlib import Path

from sparse_lora_dist import checkpoint
from sparse_lora_dist.distributed import comm
from sparse_lora_dist.distributed.console import counted, print_line
from sparse_lora_dist.errors import UserError


def verify(run: Path) -> None:
    """Compare all files of a run's checkpoints with their hashes; print a line per checkpoint.

    Nothing is written. Collective.

    Args:
        run: folder of the run.

    Raises:
        UserError: on all ranks, if the run has no checkpoint or one is damaged.
    """
    comm.start()
    folder = run / "checkpoints"
    found = checkpoint.published_for_all(folder)
    if not found:
        raise UserError(
            f"{folder} holds no published checkpoint to verify. Give --verify the --output_dir of "
            "a run that has saved one.",
            shared=True,
        )
    damages = {path: checkpoint.find_damage(path) for path in found}
    for path, damage in damages.items():
        print_line(
            "intact" if damage is None else "damaged", str(path) if damage is None else damage
        )
    num_damaged = sum(damage is not None for damage in damages.values())
    if num_damaged:
        raise UserError(
            f"--verify found damage in {num_damaged} of {counted(len(found), 'checkpoint')}; the "
            "lines above name the files. Resume with --resume auto, which skips damaged "
            "checkpoints and takes the newest intact one.",
            shared=True,
        )
