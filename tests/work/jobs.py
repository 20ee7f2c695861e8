"""What the workers of ``tests/ranks.py`` run: real jobs, in the process group of the pool."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from sparse_lora_dist.config.load import load_config
from sparse_lora_dist.errors import UserError
from sparse_lora_dist.run_folder.metrics_file import read_records
from sparse_lora_dist.train import run


def train(flags: list[str]) -> list[dict[str, Any]]:
    """The main job with these flags; its rows of metrics."""
    config = load_config(flags)
    run(config)
    return read_records(Path(config.run.output_dir) / "metrics.jsonl")


def complaint(work: Callable[[list[str]], object], flags: list[str]) -> str:
    """The message of the user error that it ends with."""
    try:
        work(flags)
    except UserError as error:
        return str(error)
    raise AssertionError("the program did not complain")
