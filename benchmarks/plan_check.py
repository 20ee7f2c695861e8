"""The planned memory of a rank against that of real runs on CPU ranks.

    python benchmarks/plan_check.py [--only ROW ...]

Every row is a training run on a random Llama of 143 M parameters. Memory is the resident memory of
the rank that needs most, minus that after imports and group setup. Rows that are not measured again
are taken from plan_check.json.
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
from _resident import forget_peak, peak_bytes

from sparse_lora_dist.distributed import comm
from sparse_lora_dist.runtime.entry_point import exit_process, quiet_others

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


NO_HOLES = {"MALLOC_MMAP_THRESHOLD_": "262144"}
"""So that freed blocks leave the process; by default glibc keeps those of up to 32 MB that lie
between others, and is faster for it."""


@dataclass(frozen=True)
class Row:
    """A run: ranks, and what its command line says."""

    ranks: int = 2
    ds_config: str = "zero3"
    options: dict[str, Any] = field(default_factory=dict)
    holes: bool = False
    """Is glibc left as it is?"""

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
    Row(2, options={"precision": "bf16", "rank": 128, "sequence_length": 128} | CHECKPOINTED),
    Row(1, options={"rank": 256, "moment_bits": 8} | CHECKPOINTED),
    Row(2, holes=True),
]


def main() -> None:
    """Measure the rows, and write the table of all that were ever measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", type=int, nargs="*", help="rows by number; [] for the table only")
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    chosen = range(len(ROWS)) if args.only is None else args.only
    if args.folder:
        on_this_rank([ROWS[i] for i in chosen], args.folder)
    with tempfile.TemporaryDirectory() as folder:
        save_model(folder)
        measured = read_results() | measure(chosen, folder)
        found = [
            (row, measured[i], planned(row, folder)) for i, row in enumerate(ROWS) if i in measured
        ]
    write("plan_check.md", report(found))
    rows = [{"row": asdict(row), "measured": m, "planned": p} for row, m, p in found]
    (RESULTS / "plan_check.json").write_text(json.dumps(rows, indent=1) + "\n")


def read_results() -> dict[int, dict[str, int]]:
    """{number of a row that was measured before: what was found}."""
    file = RESULTS / "plan_check.json"
    known = json.loads(file.read_text()) if file.exists() else []
    numbers = {json.dumps(asdict(row)): i for i, row in enumerate(ROWS)}
    return {
        numbers[text]: one["measured"]
        for one in known
        if (text := json.dumps(one["row"])) in numbers
    }


def measure(chosen: Iterable[int], folder: str) -> dict[int, dict[str, int]]:
    """{row: peaks}, all rows of a number of ranks in one group of ranks."""
    found: dict[int, dict[str, int]] = {}
    groups = sorted({(ROWS[i].ranks, ROWS[i].holes) for i in chosen})
    for ranks, holes in groups:
        own = [i for i in chosen if (ROWS[i].ranks, ROWS[i].holes) == (ranks, holes)]
        with patch.dict(os.environ, {} if holes else NO_HOLES):
            words = ["--folder", folder, "--only", *map(str, own)]
            on_ranks(__file__, *words, ranks=ranks)
        peaks = json.loads((Path(folder) / "found.json").read_text())
        found |= dict(zip(own, peaks, strict=True))
    return found


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
    """{line: bytes} in the phase that needs most, and their sum."""
    from sparse_lora_dist.config.load import load_config
    from sparse_lora_dist.plan.memory import PHASES, rank_memory
    from sparse_lora_dist.plan.scenario import PlannedEngine, Ranks
    from sparse_lora_dist.plan.shapes import shapes_of

    config = load_config(flags_of(row, folder))
    engine = PlannedEngine.of(json.loads(Path(config.run.ds_config).read_text()))
    shapes = shapes_of(config)
    memory = rank_memory(shapes, engine, Ranks(world_size=row.ranks, on_gpu=False))
    phase = max(("pass", "step"), key=lambda phase: memory.total("host", phase))
    assert phase in PHASES
    # Measured above what imports hold, and without holes in the heap unless the row says so.
    left_out = {"imports"} if row.holes else {"imports", "slack"}
    kept = [line for line in memory.lines if line.key not in left_out]
    lines = {line.key: line.bytes.get(phase, 0) for line in kept}
    return lines | {"together": sum(lines.values())}


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
        peaks = torch.tensor(peak_of(row, folder), dtype=torch.int64)
        found.append({"train": int(comm.max_over_ranks(peaks))})
        if comm.rank() == 0:
            print(row, found[-1], flush=True)
            (Path(folder) / "found.json").write_text(json.dumps(found))
    comm.barrier()
    exit_process(0)


def peak_of(row: Row, folder: str) -> int:
    """From where training begins to the end of its last step."""
    from sparse_lora_dist import train as program
    from sparse_lora_dist.config.load import load_config

    give_back()
    before = forget_peak()
    peaks = []

    class Watched(program.Job):
        def start(self, resume: Any) -> None:
            super().start(resume)
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
    comm.barrier()  # the other ranks have written their last heartbeat
    if comm.rank() == 0:
        shutil.rmtree(f"{folder}/run")
    comm.barrier()
    return peaks[0]


def give_back() -> None:
    """Freed blocks to the system."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def report(found: Iterable[tuple[Row, dict[str, int], dict[str, int]]]) -> str:
    """The result file."""
    lines = header("ranks", "measured", "planned", "planned / measured - 1", first="run")
    usual, holes = [], []
    for row, measured, plan in found:
        real, said = measured["train"], plan["together"]
        what = ", ".join(f"{k} {v}" for k, v in row.options.items()) or "usual"
        what = what if row.ds_config == "zero3" else f"{row.ds_config}, {what}"
        if row.holes:
            holes.append(f"{row.ranks} ranks, {what}: {real / said - 1:+.0%}")
            continue
        usual.append(said / real - 1)
        sizes = f"{real / 1e9:.2f} GB | {said / 1e9:.2f} GB"
        lines.append(f"| {what} | {row.ranks} | {sizes} | {usual[-1]:+.1%} |")
    table = "\n".join(lines)
    usual_run = ", ".join(f"{k} {v}" for k, v in USUAL.items())
    return f"""\
`python benchmarks/plan_check.py`: the main job on a random Llama of 8 layers of width 1024 and
32,000 tokens, on CPU ranks; usual: {usual_run}, lora.
Resident bytes of the rank that needed most in steps 1 to {STEPS}, above what it held when ranks had
met and imports were done; planned: all lines of the planner for CPU ranks.

{table}

Off by {min(usual):+.1%} to {max(usual):+.1%}. Measured with MALLOC_MMAP_THRESHOLD_=262144, so that
glibc returns what is freed, and planned without the line for holes in glibc's heap. By default
it keeps holes; measured against the whole plan: {"; ".join(holes) or "not measured"}."""


if __name__ == "__main__":
    main()
