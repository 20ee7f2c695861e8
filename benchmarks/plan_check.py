"""What the planner says of a rank's memory, beside what real runs on CPU ranks need.

    python benchmarks/plan_check.py [--only TEXT]

Every row is a run of the main job on a random Llama of 292 M parameters. Memory is resident, of the
rank that needs most, above what it held once ranks had met and imports were done: its peak until
training begins, and over the steps after that.
"""

import argparse
import contextlib
import ctypes
import gc
import json
import os
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
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
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
    "tie_word_embeddings": False,
}
STEPS = 3
"""DeepSpeed watches two steps before it fetches ahead."""

USUAL = {"micro_batch_size": 2, "sequence_length": 192, "rank": 16, "precision": "fp32"}
"""fp32: without the instructions for it, a CPU's bf16 is slow."""


GLIBC = {"MALLOC_MMAP_THRESHOLD_": "262144"}
"""So that freed blocks leave the process; by default glibc keeps holes of up to 32 MB between what
stays, as much as a half again."""


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
    """Every row of a number of ranks in one group of ranks, and the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", type=int, nargs="+", help="rows by number; nothing is written")
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    chosen = args.only or range(len(ROWS))
    if args.folder:
        on_this_rank([ROWS[i] for i in chosen], args.folder)
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        save_model(folder)
        for ranks in sorted({ROWS[i].ranks for i in chosen}):
            own = [i for i in chosen if ROWS[i].ranks == ranks]
            with patch.dict(os.environ, GLIBC):
                words = ["--folder", folder, "--only", *map(str, own)]
                on_ranks(__file__, *words, ranks=ranks)
            peaks = json.loads((Path(folder) / "found.json").read_text())
            found |= {i: one | planned(ROWS[i], folder) for i, one in zip(own, peaks, strict=True)}
    rows = {i: (ROWS[i], found[i]) for i in chosen}
    text = report(rows.values())
    if args.only:
        print(text)
        return
    write("plan_check.md", text)
    runs = [asdict(row) | one for row, one in rows.values()]
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


class Enough(Exception):
    """The steps that are measured are done."""


def on_this_rank(rows: list[Row], folder: str) -> None:
    """The main job, row after row; rank 0 leaves what was found beside the model."""
    import bitsandbytes  # noqa: F401
    import datasets  # noqa: F401
    import peft  # noqa: F401

    quiet_others()
    comm.start()
    found = []
    for row in rows:
        peaks = torch.tensor(peaks_of(row, folder), dtype=torch.int64)
        load, train = comm.max_over_ranks(peaks).tolist()
        found.append({"load": load, "train": train})
        if comm.rank() == 0:
            print(row, found[-1], flush=True)
            (Path(folder) / "found.json").write_text(json.dumps(found))
    comm.barrier()
    leave(0)


def peaks_of(row: Row, folder: str) -> list[int]:
    """Until training begins, and from there to the end of its last step."""
    from sparse_lora_dist import train as program
    from sparse_lora_dist.command_line import load_config

    give_back()
    before = forget_peak()
    peaks = []

    class Watched(program.Job):
        def start(self, resume: Any) -> None:
            super().start(resume)
            peaks.append(peak_bytes() - before)
            give_back()  # what loading freed is not training's
            forget_peak()

        def after_step(self, step: int, *args: Any, **kwargs: Any) -> None:
            if step == STEPS:
                peaks.append(peak_bytes() - before)
                raise Enough
            self.progress = replace(
                self.progress, step=step, rows=self.progress.rows + self.feed.global_batch
            )

    with patch.object(program, "Job", Watched), contextlib.suppress(Enough):
        program.run(load_config(flags_of(row, folder)))
    if comm.rank() == 0:
        shutil.rmtree(f"{folder}/run")
    comm.barrier()
    return peaks


def give_back() -> None:
    """Freed blocks to the system."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def forget_peak() -> int:
    """Resident bytes now; Linux counts its peak anew from here."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak_bytes()


def peak_bytes() -> int:
    """Most resident bytes of this process since ``forget_peak``, mapped files included."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def report(rows: Iterable[tuple[Row, dict[str, Any]]]) -> str:
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
    for row, one in rows:
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
