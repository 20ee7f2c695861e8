"""The training half of ``rehearsal_70b.py``: a real job on this machine's GPUs, or on CPUs.

Weights are random and generated where they are needed, so only the headers of the base files are
read. The base is quantised on the device, and LoRA of rank 16 trains with activation checkpointing.
Runs with offload have device memory capped at 24 GB.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

from _side_by_side import ZERO3, build  # isort: skip  # sets the path

import torch
from _job import RESULTS, header, write
from _resident import forget_peak, peak_bytes
from torch import Tensor

from sparse_lora_dist.base_model.safetensors_reader import CPU, CheckpointFiles, Source
from sparse_lora_dist.distributed import comm
from sparse_lora_dist.model.model import Model
from sparse_lora_dist.runtime.entry_point import exit_process, quiet_others

CAP_BYTES = 24_000_000_000
OFFLOAD = ZERO3.replace("zero3.json", "zero3_offload.json")
CASES: list[dict[str, Any]] = [
    {"ds_config": ds_config, "tokens": tokens, "cap": cap}
    for ds_config, cap in ((ZERO3, None), (OFFLOAD, CAP_BYTES))
    for tokens in (2048, 4096)
]
STEPS = 6
"""The first is not timed."""


def train_all(folder: str, script: str, *, keep: bool, ranks: int, tokens: int | None) -> None:
    """Every case in processes of its own; ``tokens``: another length of rows for all."""
    found = []
    for case in CASES:
        case = case | ({"tokens": tokens} if tokens else {})
        start(script, "--folder", folder, "--case", json.dumps(case), ranks=ranks)
        found.append(json.loads((Path(folder) / "found.json").read_text()))
        print(json.dumps(found[-1]), flush=True)
    if keep:
        (RESULTS / "rehearsal_70b_train.json").write_text(json.dumps(found, indent=1) + "\n")
        write("rehearsal_70b_train.md", report(found))
    else:
        print(report(found))


def start(*arguments: str, ranks: int) -> None:
    """The script again, on so many ranks."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    subprocess.run([sys.executable, *launcher, *arguments], check=True)


def train(folder: str, case: dict[str, Any]) -> None:
    """One rank's part of one case; rank 0 leaves beside the model what the worst rank needed."""
    quiet_others()
    comm.start()
    if case["cap"] and comm.on_gpu():
        all_bytes = torch.cuda.get_device_properties(comm.device()).total_memory
        torch.cuda.set_per_process_memory_fraction(min(case["cap"] / all_bytes, 1.0))
    comm.barrier()
    before, started, marks = forget_peak(), time.perf_counter(), {}

    def mark(name: str) -> None:
        synchronize()
        marks[f"{name}_s"] = time.perf_counter() - started
        marks[f"{name}_host"] = peak_bytes() - before
        marks[f"{name}_device"] = device_peak()

    load = Model.load

    def marked(self: Model, *args: Any) -> Any:
        seeds = load(self, *args)
        mark("loading")
        return seeds

    with patch.object(Model, "load", marked), patch.object(CheckpointFiles, "read", random):
        run = build(
            "lora",
            {},
            folder=folder,
            steps=STEPS,
            tokens=case["tokens"],
            ds_config=case["ds_config"],
            gradient_checkpointing=True,
        )
    seconds, losses = [], []
    for step in range(1, STEPS + 1):
        synchronize()
        begun = time.perf_counter()
        losses.append(run.step(step))
        synchronize()
        seconds.append(time.perf_counter() - begun)
    mark("training")
    most = comm.max_over_ranks(torch.tensor(list(marks.values()), dtype=torch.float64))
    found = dict(zip(marks, most.tolist(), strict=True)) | {
        "case": case | {"ds_config": Path(case["ds_config"]).stem},
        "ranks": comm.world_size(),
        "device": torch.cuda.get_device_name() if comm.on_gpu() else "cpu",
        "tokens_per_s": case["tokens"] * comm.world_size() / median(seconds[1:]),
        "losses": losses,
    }
    assert all(torch.tensor(losses).isfinite()), losses
    if comm.rank() == 0:
        (Path(folder) / "found.json").write_text(json.dumps(found))
    comm.barrier()
    exit_process(0)


def random(
    files: CheckpointFiles, source: Source, start: int, stop: int, *, device: torch.device = CPU
) -> Tensor:
    """Instead of ``CheckpointFiles.read``: numbers of a usual size, made on the device."""
    return torch.randn(max(stop - start, 0), dtype=source.dtype, device=device).mul_(0.02)


def synchronize() -> None:
    """Whatever the GPU was given is done."""
    if comm.on_gpu():
        torch.cuda.synchronize()


def device_peak() -> int:
    """Bytes that PyTorch took of the GPU, what it keeps in reserve included; 0 without one."""
    return torch.cuda.max_memory_reserved() if comm.on_gpu() else 0


def report(found: list[dict[str, Any]]) -> str:
    """The result file."""
    names = ["tokens/s", "device, loading", "device, training", "host, loading", "host, training"]
    lines = header(*names, first="engine file, tokens a row")
    for row in found:
        case = row["case"]
        first = f"{case['ds_config']}, {case['tokens']}"
        first += f", at most {case['cap'] / 1e9:.0f} GB" if case["cap"] else ""
        keys = ("loading_device", "training_device", "loading_host", "training_host")
        sizes = [f"{row[key] / 1e9:.2f} GB" for key in keys]
        lines.append(f"| {first} | {row['tokens_per_s']:.0f} | {' | '.join(sizes)} |")
    table = "\n".join(lines)
    return f"""\
`python benchmarks/rehearsal_70b.py --train`: {found[0]["ranks"]} x {found[0]["device"]},
{os.cpu_count()} cores. Llama-3-70B's shape in NF4 with double quantisation, random weights made on
the device, LoRA of rank 16 on all linears, a row a rank, activation checkpointing; median of
{STEPS - 1} steps. Peaks are of the rank that needed most: of the device what PyTorch reserved, of
the host resident bytes above the start.

{table}"""
