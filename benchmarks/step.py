"""Tokens per second, memory and traffic of a LoRA step: this project, and PEFT.

    python benchmarks/step.py [--rounds 10]

The other program is transformers + bitsandbytes + PEFT under ZeRO-3 with the same engine settings.
Both engines are in the same processes and step in turn, in an order drawn anew each round, so that
other load on the machine affects both; ratios are within a round. Memory is measured in processes
of their own.
"""

import argparse
import json
import random
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _side_by_side import ZERO3, build, on_ranks  # isort: skip  # sets the path

import torch
from _job import RESULTS, stored, write
from _resident import forget_peak, peak_bytes, resident_bytes
from _step_report import RANK, SHAPE, SMALL, TOKENS, WAYS, figures, plot, report
from _usual_way import build_usual
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sparse_lora_dist.distributed import comm
from sparse_lora_dist.distributed.console import print_line
from sparse_lora_dist.runtime.entry_point import exit_process, quiet_others

WARM_UP = 1
PHASES = ("time", *WAYS)
TINY = {"width": 256, "inner": 704, "layers": 2, "vocabulary": 1000}


@dataclass(frozen=True)
class Case:
    """One setting, the same for both ways."""

    ranks: int
    precision: str
    checkpointing: bool
    shape: dict[str, int]

    @property
    def name(self) -> str:
        """For tables and plots."""
        rows = f"{self.ranks} ranks, {self.precision}"
        return rows + (", activation checkpointing" if self.checkpointing else "")


CASES = [
    Case(2, "fp32", False, SHAPE),
    Case(2, "fp32", True, SHAPE),
    Case(4, "fp32", False, SHAPE),
    Case(4, "fp32", True, SHAPE),
    Case(2, "bf16", False, SMALL),
]


def main() -> None:
    """Every case, the results, the table and the plot."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=10, help="measured ones, of two steps each")
    parser.add_argument("--cases", type=int, nargs="+", default=list(range(len(CASES))))
    parser.add_argument("--tiny", action="store_true", help="small shapes, nothing is written")
    parser.add_argument("--phase", choices=PHASES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.phase:
        on_this_rank(args.phase, args.folder, CASES[args.cases[0]], args.rounds)
    found = {}
    for index in args.cases:
        with tempfile.TemporaryDirectory() as folder:
            save_model(folder, TINY if args.tiny else CASES[index].shape)
            flags = ["--folder", folder, "--cases", str(index), "--rounds", str(args.rounds)]
            for phase in PHASES:
                on_ranks(__file__, "--phase", phase, *flags, ranks=CASES[index].ranks)
            left = {p: json.loads((Path(folder) / f"{p}.json").read_text()) for p in PHASES}
            found[CASES[index].name] = figures(left.pop("time"), left)
            print(json.dumps(found, indent=1))
    if not args.tiny:
        everything = (stored("step.json") or {}) | found
        (RESULTS / "step.json").write_text(json.dumps(everything, indent=1) + "\n")
        write("step.md", report(everything))
        plot(everything, RESULTS / "step.png")


def save_model(folder: str, shape: dict[str, int]) -> None:
    """A Llama of random weights, in bf16."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=shape["width"],
        intermediate_size=shape["inner"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=shape["vocabulary"],
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)


# On ranks.


def engine_file() -> dict[str, Any]:
    """ds_configs/zero3.json, its limits on what stays gathered cut as the model is: about a layer
    and a half of it, half a layer ahead, as they are for a model of 70 B."""
    content: dict[str, Any] = json.loads(Path(ZERO3).read_text())
    limits = {"max_live_parameters": 2e6, "max_reuse_distance": 2e6, "prefetch_bucket_size": 7e5}
    content["zero_optimization"] |= {f"stage3_{k}": int(v) for k, v in limits.items()}
    return content


def on_this_rank(phase: str, folder: str, case: Case, rounds: int) -> None:
    """One rank's part; rank 0 leaves what was found beside the model."""
    quiet_others()
    comm.start()
    settings: Any = {"folder": folder, "steps": 1000, "tokens": TOKENS, "ds_config": engine_file()}
    settings |= {"precision": case.precision, "gradient_checkpointing": case.checkpointing}
    found = times(settings, rounds) if phase == "time" else peaks(phase, settings)
    if comm.rank() == 0:
        (Path(folder) / f"{phase}.json").write_text(json.dumps(found))
    comm.barrier()
    exit_process(0)


def built(way: str, settings: dict[str, Any], peaks: dict[str, int] | None = None) -> Any:
    """An engine that steps: ``step(number) -> loss``. Collective."""
    if way == "usual":
        return build_usual(**settings, rank=RANK, peaks=peaks, peak=peak_bytes)
    return build_ours(settings, peaks)


def build_ours(settings: dict[str, Any], peaks: dict[str, int] | None) -> Any:
    """As ``train.run`` does; the peak while loading is seen when loading ends."""
    from unittest.mock import patch

    from sparse_lora_dist.model.model import Model

    load = Model.load

    def watched(self: Model, *args: Any) -> Any:
        seeds = load(self, *args)
        if peaks is not None:
            peaks["loading"] = peak_bytes()
        return seeds

    with patch.object(Model, "load", watched):
        return build("lora", {}, **settings)


def times(settings: dict[str, Any], rounds: int) -> dict[str, Any]:
    """Seconds of every measured step of both ways, and the traffic of one. Collective."""
    runs = {way: built(way, settings) for way in WAYS}
    measured: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    shuffled = random.Random(0)
    losses = {way: runs[way].step(1) for way in WAYS}
    assert abs(losses["ours"] - losses["usual"]) < 0.01 * losses["usual"], losses
    for step in range(2, WARM_UP + rounds + 1):
        for way in shuffled.sample(WAYS, len(WAYS)):
            seconds = timed(runs[way], step)
            print_line(
                way, f"step {step}: {seconds['clock']:.1f} s, {seconds['processor']:.1f} computed"
            )
            if step > WARM_UP:
                measured[way].append(seconds)
    traffic = {}
    for way in WAYS:
        with Traffic() as seen:
            runs[way].step(WARM_UP + rounds + 1)
        traffic[way] = seen.received
    return {"steps": measured, "traffic": traffic, "first_loss": losses}


def timed(run: Any, step: int) -> dict[str, float]:
    """Seconds of one step: by the clock, of the slower rank; and what processors computed."""
    comm.barrier()
    started, cpu_started = time.perf_counter(), time.process_time()
    run.step(step)
    cpu = time.process_time() - cpu_started
    comm.barrier()
    seconds = torch.tensor([time.perf_counter() - started, cpu])
    clock, cpu = comm.max_over_ranks(seconds).tolist()
    return {"clock": clock, "processor": cpu}


class Traffic(TorchDispatchMode):
    """Every collective inside, whoever calls it: bytes that reach this rank from others, and how
    many calls, by operation."""

    def __init__(self) -> None:
        super().__init__()
        self.received: dict[str, dict[str, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func.overloadpacket.__name__.strip("_")
            entry = self.received.setdefault(name, {"calls": 0, "bytes": 0})
            entry["calls"] += 1
            arriving = sum(t.nbytes for t in tree_leaves(args[0]) if isinstance(t, Tensor))
            entry["bytes"] += arriving * (comm.world_size() - 1) // comm.world_size()
        return func(*args, **(kwargs or {}))


def peaks(way: str, settings: dict[str, Any]) -> dict[str, int]:
    """Most resident bytes above the start, of the rank that needed most: until loaded, until the
    engine stands, until two steps are done. Collective."""
    # Both ways begin with the same imports.
    import bitsandbytes
    import deepspeed
    import peft

    del bitsandbytes, deepspeed, peft
    comm.barrier()
    before = forget_peak()
    found: dict[str, int] = {}
    run = built(way, settings, found)
    found["engine"] = peak_bytes()
    forget_peak()
    found["engine, held"] = resident_bytes()
    for step in (1, 2):
        run.step(step)
    found["training"] = peak_bytes()
    own = torch.tensor([found[k] - before for k in found], dtype=torch.int64)
    return dict(zip(found, comm.max_over_ranks(own).tolist(), strict=True))


if __name__ == "__main__":
    main()
