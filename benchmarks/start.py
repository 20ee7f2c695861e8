"""Time that a program takes to import its libraries, with and without ``large_imports``.

    python benchmarks/start.py [PAIRS]

Each pair starts one process of each kind, in turn, and the ratios of the pairs are printed.
"""

import statistics
import subprocess
import sys
import time

PLAIN = "import sparse_lora_dist.train, os; os._exit(0)"
LARGE = (
    "import os\n"
    "from sparse_lora_dist.system.imports import large_imports\n"
    "with large_imports():\n"
    "    import sparse_lora_dist.train\n"
    "os._exit(0)"
)


def seconds(program: str) -> float:
    """Return the wall-clock time of a process that runs ``program``."""
    begin = time.monotonic()
    subprocess.run([sys.executable, "-c", program], check=True, stderr=subprocess.DEVNULL)
    return time.monotonic() - begin


def main(pairs: int = 5) -> None:
    """Print the ratio of each pair and their median."""
    seconds(PLAIN)  # fills the cache of files
    ratios = [seconds(LARGE) / seconds(PLAIN) for _ in range(pairs)]
    print("large_imports / plain:", ", ".join(f"{ratio:.2f}" for ratio in ratios))
    print(f"median {statistics.median(ratios):.2f}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
