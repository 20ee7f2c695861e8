"""What is freed while shares are made goes back to the system."""

import subprocess
import sys

import pytest

NUMBER, SHARE, READ = 400, 3_000, 300_000
PROGRAM = f"""
from pathlib import Path
import sys
import torch
from sparse_lora_dist.system.heap import return_gaps

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

torch.empty(32_000_000, dtype=torch.uint8)  # freed: from now on glibc would map nothing smaller
before, kept = resident(), []
for number in range({NUMBER}):
    read = torch.ones({READ} + number * 1024, dtype=torch.uint8)
    kept.append(torch.ones({SHARE}, dtype=torch.uint8))
    del read
    if sys.argv[1] == "returned":
        return_gaps()
print(resident() - before - sum(t.nbytes for t in kept))
"""


def extra_bytes(gaps: str) -> int:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, gaps], check=True, capture_output=True, text=True
    )
    return int(done.stdout.split()[-1])


@pytest.mark.usefixtures("processes")
@pytest.mark.skipif(sys.platform != "linux", reason="glibc's heap")
def test_gaps_between_shares_do_not_stay() -> None:
    reads = NUMBER * READ
    assert extra_bytes("kept") > reads / 2, "otherwise this test shows nothing"
    assert extra_bytes("returned") < reads / 4
