"""What workers run for ``test_comm.py``."""

import time
from pathlib import Path
from unittest.mock import patch

from sparse_lora_dist.distributed import comm
from sparse_lora_dist.distributed.phases import first_on_its_node


def found_on_its_node(folder: Path, ranks_a_node: int) -> list[str]:
    """What is there already when this rank's turn comes, where nodes of so many ranks share no
    disk."""
    node, local = divmod(comm.rank(), ranks_a_node)
    disk = folder / f"node {node}"
    with (
        patch.object(comm, "is_first_on_its_node", lambda: local == 0),
        first_on_its_node(),
    ):
        disk.mkdir(exist_ok=True)
        if local == 0:
            time.sleep(0.2)  # the others would come first if nobody held them back
        found = sorted(file.name for file in disk.iterdir())
        (disk / f"from {comm.rank()}").touch()
    return found
