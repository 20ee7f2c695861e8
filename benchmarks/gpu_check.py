"""Check this project on a machine with a GPU, and measure it, for when one is lent for minutes.

    python benchmarks/gpu_check.py [--out FOLDER] [--budget SECONDS]   the next parts that are not
                                                                       done, what matters most first
    python benchmarks/gpu_check.py --part NAME [--again]               one of them, done or not
    python benchmarks/gpu_check.py --tiny                              each part that a CPU can run,
                                                                       on shapes of a toy

Each part runs in a process of its own, with a limit. FOLDER (default: $OUT, else build/gpu_check)
gets results.jsonl, with each figure as soon as it is known, log.txt, and at the end a page, which
benchmarks/results/ gets too. With results.jsonl of another machine in FOLDER and no GPU here, only
the page is written. One GPU is used. Weights are random; nothing is downloaded.
"""

import argparse
import multiprocessing
import os
import sys
from multiprocessing.context import BaseContext
from pathlib import Path

from _gpu_page import write_page
from _gpu_runner import Part, Record, run_parts
from _job import RESULTS, ROOT

OURS, PEFT = "_gpu_steps:ours", "_gpu_steps:peft"
B70 = {"shape": "70B", "tokens": 4096, "steps": 6}
B8 = {"shape": "8B", "tokens": 4096, "steps": 7, "rows": (1, 4)}
PACKED = {"documents": 8, "rows": (1,)}
SPARSE = {"methods": ("lora", "roselora", "adalora"), "rows": (1,), "steps": 8}
CAPPED = {"tokens": 2048, "steps": 4, "engine": "zero3_offload", "cap_bytes": 24_000_000_000}
PARTS = (
    Part(name="facts", work="_gpu_jobs:facts", usual_s=20, limit_s=60),
    Part(name="smoke", work="_gpu_jobs:smoke", usual_s=50, limit_s=120),
    Part(name="kernels", work="_gpu_kernels:kernels", usual_s=35, limit_s=90),
    Part(name="70B", work=OURS, arguments=B70, usual_s=75, limit_s=150),
    Part(name="70B PEFT", work=PEFT, arguments=B70, usual_s=60, limit_s=120),
    Part(name="8B", work=OURS, arguments=B8, usual_s=45, limit_s=90),
    Part(name="8B PEFT", work=PEFT, arguments=B8, usual_s=35, limit_s=75),
    Part(name="8B whole", work=OURS, arguments=B8 | {"engine": "whole"}, usual_s=45, limit_s=90),
    Part(name="8B sparse", work=OURS, arguments=B8 | SPARSE, usual_s=70, limit_s=150),
    Part(name="8B packed", work=OURS, arguments=B8 | PACKED, usual_s=30, limit_s=75),
    Part(name="packing", work="_gpu_kernels:packing", usual_s=25, limit_s=60),
    Part(name="same bits", work="_gpu_jobs:same_bits", usual_s=35, limit_s=90),
    Part(name="sanitizer", work="_gpu_jobs:sanitizer", usual_s=40, limit_s=90, needs_gpu=True),
    Part(name="70B in 24 GB", work=OURS, arguments=B70 | CAPPED, usual_s=110, limit_s=240),
    Part(name="gpu tests", work="_gpu_jobs:gpu_tests", usual_s=80, limit_s=180, needs_gpu=True),
)
"""In the order of what their figures are worth, should the time run out."""


def main() -> None:
    """Run what is to be run, then write the page."""
    sys.path.insert(0, str(ROOT))
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="folder of the results")
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds for all parts")
    parser.add_argument("--part", choices=[part.name for part in PARTS], help="this one alone")
    parser.add_argument("--again", action="store_true", help="parts that ended rightly, too")
    parser.add_argument("--tiny", action="store_true", help="shapes of a toy")
    args = parser.parse_args()
    folder = args.out or Path(os.environ.get("OUT", ROOT / "build" / "gpu_check"))
    record = Record(folder.resolve() / ("tiny.jsonl" if args.tiny else "results.jsonl"))
    parts = [part for part in PARTS if args.part in (None, part.name)]
    done = set() if args.again else record.done()
    gpu = has_gpu()
    if gpu or args.tiny:
        idle = all(part.name in done or (part.needs_gpu and not gpu) for part in parts)
        context = processes(gpu, idle)
        run_parts(parts, record, context, gpu=gpu, tiny=args.tiny, done=done, budget_s=args.budget)
    else:
        print("skipped: needs a GPU that PyTorch can use. --tiny tries what a CPU can run")
    if not args.tiny:
        write_page(record.rows(), record.file.parent, RESULTS)


def has_gpu() -> bool:
    """Return whether this process and those that it starts compute on a GPU."""
    import torch

    gpu = torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count()) if gpu else "1")
    if gpu:  # as ``comm.start`` has it, for PEFT too
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    return gpu


def processes(gpu: bool, idle: bool) -> BaseContext:
    """Return what starts processes. CUDA does not survive a fork; without it, what all parts import
    is imported here, once."""
    way = "spawn" if gpu else "fork"
    os.environ["GPU_CHECK_START"] = way  # for processes that parts start themselves
    if not gpu and not idle:
        from sparse_lora_dist.system.imports import large_imports

        with large_imports():
            import peft  # noqa: F401

            import sparse_lora_dist.train  # noqa: F401
    return multiprocessing.get_context(way)


if __name__ == "__main__":
    main()
