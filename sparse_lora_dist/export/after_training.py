"""Writes the adapter of a finished run whose update is not a LoRA, as another PEFT type.

Some methods have an adapter type of their own in PEFT, e.g. SHiRA.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from sparse_lora_dist import checkpoint
from sparse_lora_dist.distributed import comm
from sparse_lora_dist.distributed.console import print_line
from sparse_lora_dist.distributed.phases import fail_together
from sparse_lora_dist.export.peft_own_type import write_own_type
from sparse_lora_dist.export.trained_run import Trained
from sparse_lora_dist.system.whole_folders import replace_whole


def save_own_type(run: Path, adapter: Path, remove: Callable[[Path], None]) -> int:
    """Write the adapter of a run's newest checkpoint as its method's own PEFT type. Collective.

    To be called at the end of training if the update is not a LoRA. Only rank 0 reads and writes.
    If PEFT has no adapter type for the method, or the run has no checkpoint, nothing is written,
    and rank 0 removes the adapter that an earlier job of the run may have written.

    Args:
        run: Run folder. Its newest complete checkpoint is read.
        adapter: Folder to write. An existing one is replaced as a whole.
        remove: Function that removes the adapter of the run folder passed to it.

    Returns:
        Size of adapter_model.safetensors in bytes on rank 0, or 0 if nothing was written; 0 on
        other ranks.

    Raises:
        UserError: The checkpoint cannot be read or the folder cannot be written. Raised on every
            rank.
    """
    with fail_together(f"writing {adapter}", may_pass=True):
        # Only rank 0 lists checkpoints: another node may see an older listing.
        published = checkpoint.published(run / "checkpoints") if comm.rank() == 0 else []
        own = Trained.at(published[-1]).own_type() if published else None
        if own is not None:
            write = partial(write_own_type, trained=own)
            return replace_whole(adapter, write, partial(print_line, "warning"))
        if comm.rank() == 0:  # an adapter of an earlier job is not the result of this one
            remove(run)
    return 0
