"""What the planner says of a rank's memory, beside what real runs on CPU ranks need.

    python benchmarks/plan_check.py [--only TEXT]

Every row is a run of the main job on a random Llama of 292 M parameters. Memory is resident, of the
rank that needs most, above what it held once ranks had met and imports were done: its peak until
training begins, and over the steps after that.
"""

import argparse
import ctypes
import json
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

from _side_by_side import ROOT, on_ranks  # isort: skip  # sets the path

import torch
from _job import RESULTS, header, write

from sparse_lora_dist import comm
from sparse_lora_dist.program import leave, quiet_others

LLAMA = {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 12,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
    "tie_word_embeddings": False,
}
STEPS = 3
"""DeepSpeed watches two steps before it fetches ahead."""

USUAL = {"micro_batch_size": 2, "sequence_length": 256, "rank": 16, "precision": "fp32"}
"""fp32: without the instructions for it, a CPU's bf16 is slow."""


@dataclass(frozen=True)
class Row:
    """A run: ranks, and what its command line says."""

    ranks: int = 2
    ds_config: str = "zero3"
    options: dict[str, Any] = field(default_factory=dict)

    def flags(self) -> list[str]:
        given = USUAL | self.options
        return [word for k, v in given.items() for word in (f"--{k}", str(v))]


CHECKPOINTED = {"gradient_checkpointing": "true"}
ROWS = [
    Row(1),
    Row(2),
    Row(4),
    Row(2, options={"sequence_length": 512}),
    Row(2, options={"sequence_length": 512} | CHECKPOINTED),
    Row(2, options={"rank": 256} | CHECKPOINTED),
    Row(2, options={"rank": 128, "method": "roselora"} | CHECKPOINTED),
    Row(2, options={"rank": 128, "method": "adalora"} | CHECKPOINTED),
    Row(2, options={"rank": 128, "method": "increlora"} | CHECKPOINTED),
    Row(2, "zero3_offload", options={"rank": 128} | CHECKPOINTED),
    Row(2, options={"precision": "bf16", "rank": 128, "sequence_length": 64} | CHECKPOINTED),
    Row(1, options={"rank": 256, "moment_bits": 8} | CHECKPOINTED),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rank_of", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    parser.add_argument("--only", type=int, nargs="+")
    args = parser.parse_args()
    if args.rank_of:
        on_this_rank(args.rank_of)
    rows = [row for i, row in enumerate(ROWS) if not args.only or i in args.only]
    with tempfile.TemporaryDirectory() as folder:
        save_model(folder)
        found = [measured(row, folder) | planned(row, folder) for row in rows]
    text = report(rows, found)
    if args.only:
        print(text)
        return
    write("plan_check.md", text)
    runs = [asdict(row) | one for row, one in zip(rows, found, strict=True)]
    (RESULTS / "plan_check.json").write_text(json.dumps(runs, indent=1) + "\n")


def save_model(folder: str) -> None:
    """Random weights, with the tokenizer of the embedded model."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng():
        torch.set_default_dtype(torch.bfloat16)
        LlamaForCausalLM(LlamaConfig(**LLAMA)).save_pretrained(folder)
        torch.set_default_dtype(torch.float32)
    AutoTokenizer.from_pretrained(ROOT / "assets" / "base").save_pretrained(folder)


def flags_of(row: Row, folder: str) -> list[str]:
    """The command line of the run."""
    data = str(ROOT / "assets" / "gsm8k" / "train.jsonl")
    return [
        *("--model", folder, "--data", data, "--output_dir", f"{folder}/run"),
        *("--ds_config", str(ROOT / "ds_configs" / f"{row.ds_config}.json")),
        *("--trackers", "[]", "--max_steps", str(STEPS), "--save_every", "0"),
        *row.flags(),
    ]


def measured(row: Row, folder: str) -> dict[str, int]:
    """Peaks of the worst rank, in bytes."""
    on_ranks(__file__, "--rank_of", *flags_of(row, folder), ranks=row.ranks)
    found: dict[str, int] = json.loads((Path(folder) / "found.json").read_text())
    return found


def planned(row: Row, folder: str) -> dict[str, int]:
    """The same from the planner."""
    from sparse_lora_dist.command_line import load_config
    from sparse_lora_dist.plan.job import Engine, Ranks
    from sparse_lora_dist.plan.memory import rank_memory
    from sparse_lora_dist.plan.shapes import shapes_of

    config = load_config(flags_of(row, folder))
    engine = Engine.of(json.loads(Path(config.run.ds_config).read_text()))
    memory = rank_memory(
        shapes_of(config, whole_logits=True), engine, Ranks(world_size=row.ranks, on_gpu=False)
    )
    lines = {f"{line.key}": line.bytes.get("pass", 0) for line in memory.lines}
    return {
        "planned_load": memory.total("host", "load"),
        "planned_pass": memory.total("host", "pass"),
        "planned_step": memory.total("host", "step"),
        "lines": lines,
    }


def on_this_rank(flags: list[str]) -> None:
    """The main job; rank 0 leaves what was found beside the model."""
    import bitsandbytes  # noqa: F401
    import datasets  # noqa: F401
    import peft  # noqa: F401

    from sparse_lora_dist import train as program
    from sparse_lora_dist.command_line import load_config

    quiet_others()
    comm.start()
    config = load_config(flags)
    before = forget_peak()
    peaks: list[int] = []

    def begin_training(job: Any, resume: Any) -> None:
        start(job, resume)
        peaks.append(peak_bytes() - before)
        ctypes.CDLL(None).malloc_trim(0)  # what loading freed is not training's
        forget_peak()

    def stop_after_last(job: Any, step: int, *args: Any, **kwargs: Any) -> None:
        print(step, peak_bytes() - before, file=sys.stderr, flush=True)
        if step == STEPS:
            peaks.append(peak_bytes() - before)
            finish(config.model.model, peaks)
        job.progress = type(job.progress)(
            step=step, rows=job.progress.rows + job.feed.global_batch, tokens=0
        )

    start = program.Job.start
    with (
        patch.object(program.Job, "start", begin_training),
        patch.object(program.Job, "after_step", stop_after_last),
    ):
        program.run(config)


def finish(folder: str, peaks: list[int]) -> None:
    load, train = comm.max_over_ranks(torch.tensor(peaks, dtype=torch.int64)).tolist()
    if comm.rank() == 0:
        found = {"load": load, "train": train}
        (Path(folder) / "found.json").write_text(json.dumps(found))
    comm.barrier()
    leave(0)


def forget_peak() -> int:
    """Resident bytes now; Linux counts its peak anew from here."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak_bytes()


def peak_bytes() -> int:
    """Most resident bytes of this process since ``forget_peak``, mapped files included."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def report(rows: list[Row], found: list[dict[str, Any]]) -> str:
    """The result file."""
    lines = header(
        "ranks",
        "train: measured",
        "planned",
        "off by",
        "load: measured",
        "planned",
        "off by",
        first="run",
    )
    for row, one in zip(rows, found, strict=True):
        train = max(one["planned_pass"], one["planned_step"])
        said = ", ".join(f"{k} {v}" for k, v in row.options.items()) or "as a run by default"
        said = f"{row.ds_config}: {said}"
        cells = [str(row.ranks)]
        for real, plan in ((one["train"], train), (one["load"], one["planned_load"])):
            cells += [f"{real / 1e9:.2f} GB", f"{plan / 1e9:.2f} GB", f"{plan / real - 1:+.0%}"]
        lines.append(f"| {said} | {' | '.join(cells)} |")
    table = "\n".join(lines)
    return f"""\
{table}"""


if __name__ == "__main__":
    main()
