"""How long saving a checkpoint of 100 M adapter entries stops training, and the checkpoint's size.

    python benchmarks/saving.py [--rank 488]

Two CPU ranks. Times are from one run, as fractions of the time for which a synchronous save stops a
step; bytes are exact. DeepSpeed's own checkpoint is saved from an engine of transformers +
bitsandbytes + PEFT after a step of the same LoRA; it pickles the optimizer, which this project
never does.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from _side_by_side import ZERO3, Run, build, on_ranks, save_llama  # isort: skip  # sets the path

from _job import header, write
from _usual_way import build_usual

from sparse_lora_dist import checkpoint
from sparse_lora_dist.checkpoint import Progress, Saver
from sparse_lora_dist.distributed import comm
from sparse_lora_dist.runtime.entry_point import exit_process, quiet_others

RANKS, ROUNDS, TOKENS = 2, 5, 256
MODEL = {"width": 1024, "inner": 2816, "layers": 11}
ABOUT = {"description": {}, "total_steps": 0, "config": {}, "held_out_loss": None}


def main() -> None:
    """Make the model, run the ranks, write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rank", type=int, default=488)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.folder:
        on_this_rank(Path(arguments.folder), arguments.rank)
    with tempfile.TemporaryDirectory() as folder:
        save_llama(folder, **MODEL)
        on_ranks(__file__, "--folder", folder, "--rank", str(arguments.rank), ranks=RANKS)
        found = json.loads((Path(folder) / "found.json").read_text())
    write("saving.md", report(found))


def on_this_rank(folder: Path, rank: int) -> None:
    """One rank's part; rank 0 leaves what was found beside the model."""
    quiet_others()
    comm.start()
    run = build("lora", {}, folder=str(folder), steps=1000, tokens=TOKENS, rank=rank)
    found = times_of(run, folder) | bytes_of(run, folder, rank)
    if comm.rank() == 0:
        (folder / "found.json").write_text(json.dumps(found))
    comm.barrier()
    exit_process(0)


def times_of(run: Run, folder: Path) -> dict[str, Any]:
    """Seconds, medians: of a step, of what each way of saving holds it up, of steps meanwhile."""
    steps = iter(range(1, 1000))

    def step() -> float:
        started = time.perf_counter()
        run.step(next(steps))
        comm.barrier()
        return time.perf_counter() - started

    for _ in range(3):
        step()
    seen: dict[str, list[float]] = {"step": [], "held": [], "beside": [], "meanwhile": []}
    late, resume = [], []
    savers = {
        "held": Saver(folder / "held", beside=False),
        "beside": Saver(folder / "beside", beside=True),
    }
    for number in range(1, ROUNDS + 1):
        seen["step"].append(step())
        for way, saver in savers.items():
            started = time.perf_counter()
            saver.begin(run.shards, Progress(step=number), ABOUT)
            seen[way].append(time.perf_counter() - started)
        late.append(0)
        while savers["beside"].poll() is None:
            seen["meanwhile"].append(step())
            late[-1] += 1
        started = time.perf_counter()
        path = checkpoint.newest_whole(folder / "beside")
        assert path is not None
        checkpoint.restore(path, run.shards, checkpoint.read_manifest(path), frozenset())
        resume.append(time.perf_counter() - started)
    medians = {name: statistics.median(values) for name, values in seen.items() if values}
    return medians | {"steps": statistics.median(late), "resume": statistics.median(resume)}


def bytes_of(run: Run, folder: Path, rank: int) -> dict[str, Any]:
    """Of ours, and of what DeepSpeed saves of the usual way, with and without the frozen base."""
    found = {
        "entries": sum(p.numel for p in run.engine.slices),
        "ours": size(folder / "held" / f"step_{ROUNDS:08d}"),
    }
    usual = build_usual(
        folder=str(folder),
        tokens=TOKENS,
        ds_config=ZERO3,
        precision="bf16",
        gradient_checkpointing=False,
        rank=rank,
        steps=1,
        peaks=None,
        peak=int,
    )
    usual.step(1)
    for name, without in (("deepspeed", False), ("deepspeed_adapter", True)):
        usual.engine.save_checkpoint(str(folder / name), exclude_frozen_parameters=without)
        comm.barrier()
        found[name] = size(folder / name)
    return found


def size(folder: Path) -> int:
    """Bytes of all files."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def report(found: dict[str, Any]) -> str:
    """Markdown."""
    held = found["held"]
    lines = [
        f"`python benchmarks/saving.py`: {RANKS} CPU ranks, LoRA on a random Llama of "
        f"{MODEL['layers']} layers of width {MODEL['width']}, {found['entries']:,} entries. "
        f"Medians of {ROUNDS} rounds of one run.",
        "",
        *header("time, of a synchronous save"),
        "| a synchronous save holds the step | 1.00 |",
        f"| one written beside training holds it | {found['beside'] / held:.2f} |",
        f"| a step of {TOKENS} tokens a rank, for scale | {found['step'] / held:.2f} |",
        f"| finding, checking and restoring a checkpoint | {found['resume'] / held:.2f} |",
        "",
        f"Written beside, it has its name {found['steps']:.0f} steps later; a step meanwhile takes "
        f"{found.get('meanwhile', found['step']) / found['step']:.2f} times its usual time (there "
        "are as many ranks as cores here, so that the writing thread takes a core from one).",
        "",
        *header("bytes", "of ours"),
    ]
    names = {
        "ours": "ours: masters, moments, live sets",
        "deepspeed_adapter": "DeepSpeed, frozen parameters left out",
        "deepspeed": "DeepSpeed",
    }
    lines += [
        f"| {text} | {found[name]:,} | {found[name] / found['ours']:.2f} |"
        for name, text in names.items()
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
