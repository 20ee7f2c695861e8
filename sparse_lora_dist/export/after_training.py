"""The adapter that a run leaves where its updates are no LoRA: PEFT's own type, if there is one."""

import shutil
from functools import partial
from pathlib import Path

from sparse_lora_dist import checkpoint
from sparse_lora_dist.distributed import comm
from sparse_lora_dist.distributed.phases import fail_together
from sparse_lora_dist.export.peft_own_type import write_own_type
from sparse_lora_dist.export.trained_run import Trained
from sparse_lora_dist.system.atomic_files import replace_whole


def save_own_type(run: Path, adapter: Path) -> int:
    """From the last checkpoint of ``run``; bytes of its weights on rank 0, 0 where PEFT has no such
    type. Collective."""
    with fail_together(f"writing {adapter}"):
        # On rank 0 alone: another node may see an earlier listing.
        published = checkpoint.published(run / "checkpoints") if comm.rank() == 0 else []
        own = Trained.at(published[-1]).own_type() if published else None
        if own is not None:
            return replace_whole(adapter, partial(write_own_type, trained=own))
        if comm.rank() == 0:  # an earlier attempt's is not this run's end
            shutil.rmtree(adapter, ignore_errors=True)
    return 0
