"""What is freed while a base is loaded goes back to the system."""

import subprocess
import sys

import pytest

ROUNDS, KEPT, FREED = 60, 3_000_000, 9_000_000
SMALL = 200_000
PROGRAM = f"""
from contextlib import nullcontext
from pathlib import Path
import sys
import torch
from sparse_lora_dist.base_model.heap import apart, large_blocks_apart

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

heap = nullcontext() if sys.argv[1] == "usual" else large_blocks_apart()
stays = apart if sys.argv[1] == "small apart" else lambda t: t
torch.empty(32_000_000, dtype=torch.uint8)  # freed: from now on glibc would map nothing smaller
size = {SMALL} if "small" in sys.argv[1] else {KEPT}
before, kept = resident(), []
with heap:
    for number in range({ROUNDS} * (10 if "small" in sys.argv[1] else 1)):
        reads = [torch.ones(3 * size + number % 60 * 4096 * i, dtype=torch.uint8) for i in range(2)]
        kept.append(stays(torch.ones(size + number % 60 * 4096, dtype=torch.uint8)))
        del reads
print(resident() - before - sum(t.nbytes for t in kept))
"""


def extra_bytes(how: str) -> int:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, how], check=True, capture_output=True, text=True
    )
    return int(done.stdout.split()[-1])


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's heap")
def test_shares_alone_stay_where_large_reads_come_and_go_between_them() -> None:
    assert extra_bytes("apart") < FREED / 2
    assert extra_bytes("usual") > FREED, "otherwise this test shows nothing"


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's heap")
def test_small_shares_lie_apart_from_scratch() -> None:
    """Neither is mapped by itself: of 64 ranks many a share is that small."""
    held = 10 * ROUNDS * SMALL
    assert extra_bytes("small apart") < held / 2
    assert extra_bytes("small") > held / 2, "otherwise this test shows nothing"
