"""Waits of the host and launches of a training step, counted on a pretended CUDA device.

python benchmarks/waits.py [METHOD ...]

A model of two and one of four layers train alike, so what differs is what a linear costs.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from _job import ROOT, header, write
from transformers import AutoConfig, AutoModelForCausalLM

from sparse_lora_dist.methods import METHODS
from tests.laws import LAWS

STEPS, LAYERS, LINEARS = 12, (2, 4), 7
PHASES = ("forward", "backward", "decision and update", "decision")
NOT_OURS = (" at deepspeed/",)
"""Waits for gathers that began two or three gathers before, which are normally over."""


def main() -> None:
    """Count for each method, and write the table."""
    names = sys.argv[1:] or list(METHODS)
    with tempfile.TemporaryDirectory() as folder:
        models = [save_model(Path(folder) / f"model_{count}", count) for count in LAYERS]
        rows = [row(name, count_runs(Path(folder) / name, name, models)) for name in names]
    write("waits.md", report(rows))


def save_model(folder: Path, layers: int) -> Path:
    """The embedded model's shape with another number of layers, and random weights."""
    base = ROOT / "assets" / "base"
    config = AutoConfig.from_pretrained(base)
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = (config.layer_types * layers)[:layers]
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    for file in base.glob("token*"):
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def count_runs(folder: Path, method: str, models: Sequence[Path]) -> list[dict[str, Any]]:
    """What was counted in a run over each of the models, and its number of decisions."""
    folder.mkdir()
    options = {"method": method, **LAWS[method].on, "max_steps": STEPS, "log_every": STEPS}
    options |= {"sequence_length": 128, "micro_batch_size": 2, "eval_batches": 1}
    options |= {"ds_config": ROOT / "ds_configs" / "zero3.json", "save_every": 0}
    runs = [
        (
            "train",
            [f"--{k}={v}" for k, v in options.items()] + [f"--model={m}", f"--output_dir={o}"],
        )
        for m, o in zip(models, outputs(folder, models), strict=True)
    ]
    report_file = folder / "report.json"
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1"]
    job = ["-m", "tests.pretended_device.run", json.dumps(runs), str(report_file)]
    subprocess.run(
        [sys.executable, *command, *job],
        env=os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
        cwd=ROOT,
        check=True,
        stdout=subprocess.DEVNULL,
    )
    found: list[dict[str, Any]] = json.loads(report_file.with_suffix(".0.json").read_text())
    for one, out in zip(found, outputs(folder, models), strict=True):
        decisions = out / "decisions.jsonl"
        one["decisions"] = len(decisions.read_text().splitlines()) if decisions.exists() else 0
    return found


def outputs(folder: Path, models: Sequence[Path]) -> list[Path]:
    """Run folders, one for each model."""
    return [folder / f"run_{model.name}" for model in models]


def row(method: str, found: Sequence[dict[str, Any]]) -> str:
    """One line of the table."""
    few, many = found
    more = (LAYERS[1] - LAYERS[0]) * LINEARS

    def total(run: dict[str, Any], kind: str, phase: str) -> int:
        counts = run[kind].get(phase, {}).items()
        return sum(n for place, n in counts if not any(word in place for word in NOT_OURS))

    def a_linear(kind: str, phase: str) -> float:
        times = few["decisions"] if phase == "decision" else STEPS
        difference = total(many, kind, phase) - total(few, kind, phase)
        return difference / more / times if times else 0.0

    steps = PHASES[:3]
    waits = sum(total(few, "waits", phase) for phase in steps) / STEPS
    cells = [f"{waits:.1f}", f"{sum(a_linear('waits', phase) for phase in steps):.2f}"]
    cells += [f"{a_linear('launches', phase):.1f}" for phase in steps]
    if few["decisions"]:
        cells += [f"{a_linear(kind, 'decision'):.1f}" for kind in ("waits", "launches")]
    else:
        cells += ["-", "-"]
    return f"| {method} | {' | '.join(cells)} |"


def report(rows: Sequence[str]) -> str:
    """The page."""
    names = (
        "waits a step",
        "waits a step and linear",
        "launches a linear: forward",
        "backward",
        "update",
        "waits a decision and linear",
        "launches",
    )
    table = "\n".join([*header(*names, first="method"), *rows])
    return f"""{table}

One rank, {STEPS} steps, no checkpointing; the embedded model's layers of {LINEARS} linears, two
and four of them. "A linear" is the difference of both runs, divided by the linears that one has
more; so the launches of forward and backward hold a seventh of a layer's attention and norms, too.
Waits of DeepSpeed for earlier gathers are left out. A method that writes whole tensors anew (cola,
losa, mora, prilora, pst, sara, shira) gathers one linear after another for it, and waits for each;
sara asks for eigenvalues of each linear in each step, and cuSOLVER reports them to the host.
"""


if __name__ == "__main__":
    main()
