"""Starts a training job from the command line and reads its metrics."""

import json
import os
import socket
import subprocess
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def train(*flags: str, ranks: int = 2, folder: str | None = None) -> list[dict[str, Any]]:
    """The rows of metrics of one job on ``ranks`` ranks, which leaves its ``folder``, if named."""
    place = nullcontext(folder) if folder else tempfile.TemporaryDirectory()
    with place as folder:
        command = [str(Path(sys.executable).with_name("deepspeed")), "--quiet"]
        command += ["--master_port", str(free_port()), "--num_gpus", str(ranks)]
        command += ["launcher/train.py"]
        command += ["--ds_config", "ds_configs/zero3.json", "--output_dir", folder, *flags]
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        subprocess.run(command, cwd=ROOT, check=True, env=os.environ | {"PATH": path})
        lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def free_port() -> int:
    """One that no other job on this machine has."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def data_folder(name: str, what: str) -> Path | None:
    """Of the command line, or ``name`` in the folder that ``make bench DATA=`` names. With neither,
    None and a line that asks for the folder that ``what``: not everybody has the data."""
    if len(sys.argv) == 2:
        return Path(sys.argv[1])
    if os.environ.get("DATA"):
        return Path(os.environ["DATA"]) / name
    print("skipped: name the folder that", what)
    return None


def held_out(rows: list[dict[str, Any]]) -> tuple[float, float]:
    """Held-out loss before and after, nats per target token."""
    losses = [row["held_out_loss"] for row in rows if "held_out_loss" in row]
    return losses[0], losses[-1]


def stored(name: str) -> Any:
    """What an earlier call left, so that cases can be run one at a time; None before the first."""
    file = RESULTS / name
    return json.loads(file.read_text()) if file.exists() else None


def write(name: str, text: str) -> None:
    """Print a result and put it under benchmarks/results."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / name).write_text(text + "\n")
    print(text)


def header(*names: str, first: str = "") -> list[str]:
    """Of a Markdown table whose other columns are numbers."""
    return [f"| {first} | {' | '.join(names)} |", "|---|" + len(names) * "---:|"]
