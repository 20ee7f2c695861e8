"""Processor time of the host for a step whose tensors are so small that all of it is Python and
dispatch: this project, and transformers + bitsandbytes + PEFT without DeepSpeed and under ZeRO-3.

    python benchmarks/host_time.py [--layers 32 80] [--rounds 10] [--json FILE]

One rank, one micro-batch a step. All engines are in one process and step in turn, in an order drawn
anew each round; ratios are within a round, and the median of the rounds is said.
"""

import argparse
import json
import random
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any, Protocol
from unittest.mock import patch

from _side_by_side import ZERO3, build, on_ranks, save_llama  # isort: skip

import torch
from _usual_way import Peft, build_usual, quantised_peft

from sparse_lora_dist.distributed import comm
from sparse_lora_dist.distributed.console import print_line
from sparse_lora_dist.runtime.entry_point import exit_process, quiet_others
from sparse_lora_dist.zero3 import whole

TOKENS, RANK, WARM_UP = 16, 8, 2
REFERENCE = "peft"


class Steps(Protocol):
    """An engine of any of the ways."""

    def step(self, step: int) -> float:
        """Make one optimizer step and return its loss."""


def main() -> None:
    """Measure every number of layers, with activation checkpointing and without."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, nargs="+", default=[32, 80])
    parser.add_argument("--rounds", type=int, default=10, help="measured ones, a step of each way")
    parser.add_argument("--json", help="file for the results")
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.folder:
        on_this_rank(Path(args.folder), args.layers[0], args.rounds)
    found = {}
    for layers in args.layers:
        with tempfile.TemporaryDirectory() as folder:
            save_llama(folder, width=64, inner=128, layers=layers)
            flags = ["--folder", folder, "--layers", str(layers), "--rounds", str(args.rounds)]
            on_ranks(__file__, *flags, ranks=1)
            found |= json.loads((Path(folder) / "found.json").read_text())
    print(json.dumps(found, indent=1))
    if args.json:
        Path(args.json).write_text(json.dumps(found, indent=1) + "\n")


def on_this_rank(folder: Path, layers: int, rounds: int) -> None:
    """Measure one model, and leave what was found beside it."""
    torch.set_num_threads(1)
    quiet_others()
    comm.start()
    found = {}
    for checkpointing in (False, True):
        name = f"{layers} layers" + (", activation checkpointing" if checkpointing else "")
        found[name] = ratios(str(folder), rounds, checkpointing=checkpointing)
        print_line(name, json.dumps(found[name]))
    (folder / "found.json").write_text(json.dumps(found))
    exit_process(0)


def ratios(folder: str, rounds: int, *, checkpointing: bool) -> dict[str, float]:
    """Return the median seconds of a step of the reference, and of each way's ratio to it."""
    ways = all_ways(folder, checkpointing=checkpointing)
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    shuffled = random.Random(0)
    for step in range(1, WARM_UP + rounds + 1):
        for way in shuffled.sample(list(ways), len(ways)):
            started = time.process_time()
            ways[way].step(step)
            if step > WARM_UP:
                seconds[way].append(time.process_time() - started)
    found = {f"{REFERENCE}_seconds": median(seconds[REFERENCE])}
    for way in ways:
        pairs = zip(seconds[way], seconds[REFERENCE], strict=True)
        found[f"{way}_over_peft"] = median(own / other for own, other in pairs)
    return {name: round(value, 3) for name, value in found.items()}


def all_ways(folder: str, *, checkpointing: bool) -> dict[str, Steps]:
    """Build an engine of each way over the same base."""
    settings: dict[str, Any] = {"folder": folder, "steps": 1000, "tokens": TOKENS}
    settings |= {"precision": "fp32", "gradient_checkpointing": checkpointing, "rank": RANK}
    base = quantised_peft(
        folder, dtype=torch.float32, rank=RANK, gradient_checkpointing=checkpointing
    )
    return {
        REFERENCE: Peft(base, rows=1, tokens=TOKENS),
        "usual_zero3": build_usual(
            **settings, ds_config=_persistent(0), peaks=None, peak=lambda: 0
        ),
        "sharded": _sharded("lora", {}, **settings, ds_config=_persistent(0)),
        "one_rank": build("lora", {}, **settings, ds_config=_persistent(0)),
        "whole": build("lora", {}, **settings, ds_config=_persistent(10**12)),
    }


def _sharded(*arguments: Any, **options: Any) -> Steps:
    """Build an engine that gathers the base for each use, as one of several ranks does: a single
    rank, which has all shards, keeps them gathered."""
    with patch.object(whole, "offloads_parameters", return_value=True):
        return build(*arguments, **options)


def _persistent(up_to: int) -> dict[str, Any]:
    """The engine file zero3.json, where parameters of at most so many elements stay gathered."""
    engine: dict[str, Any] = json.loads(Path(ZERO3).read_text())
    engine["zero_optimization"]["stage3_param_persistence_threshold"] = up_to
    return engine


if __name__ == "__main__":
    main()
