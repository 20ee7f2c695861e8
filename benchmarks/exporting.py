"""Memory and time of exporting an adapter of a model of 1.1 B parameters, in every format.

    python benchmarks/exporting.py

A random Llama of 1.1 B parameters in bf16 is trained for one step with LoRA of rank 16 on all
linears and saved. Each format is then exported in a process of its own. Memory is resident memory,
mapped files included, minus that after imports; times are relative to that of the merged export.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time

from _job import ROOT, header, train, write
from _resident import forget_peak, peak_bytes
from load import LLAMA, save_model

FORMATS = {
    "peft": [],
    "peft, --uniform_rank": ["--uniform_rank"],
    "merged, bf16": ["--format", "merged"],
    "merged, fp32": ["--format", "merged", "--dtype", "fp32"],
    "merged, bf16, onto the original weights": ["--format", "merged", "--onto", "original"],
    "sparse_delta of a RoseLoRA": ["--format", "sparse_delta"],
}


def main() -> None:
    """Train, export in every format, write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one", nargs="+", help=argparse.SUPPRESS)
    words, rest = parser.parse_known_args()
    if words.one:
        measure(words.one + rest)
        return
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        model = f"{folder}/model"
        save_model(model, LLAMA)
        from transformers import AutoTokenizer

        AutoTokenizer.from_pretrained(ROOT / "assets" / "base").save_pretrained(model)
        for method in ("lora", "roselora"):
            run_of(method, model, folder)
        for name, flags in FORMATS.items():
            run = f"{folder}/{'roselora' if 'delta' in name else 'lora'}"
            words = [run, "--output", f"{folder}/out", "--overwrite", *flags]
            command = [sys.executable, __file__, "--one", *words]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            found[name] = json.loads(done.stdout.splitlines()[-1])
    write("exporting.md", report(found))


def run_of(method: str, model: str, folder: str) -> None:
    """Three steps on one rank, and a checkpoint."""
    sparse = ["--roselora_keep", "0.05"] if method == "roselora" else []
    train(
        *("--model", model, "--method", method, "--precision", "bf16", "--max_steps", "3"),
        *("--sequence_length", "128", "--micro_batch_size", "1", "--eval_every", "0"),
        *("--eval_batches", "1", "--save_every", "0", "--trackers", "[]", *sparse),
        ranks=1,
        folder=f"{folder}/{method}",
    )


def measure(words: list[str]) -> None:
    """One export, in this process; prints what it took."""
    sys.path.insert(0, str(ROOT))
    from transformers.models.llama import modeling_llama  # noqa: F401

    from sparse_lora_dist.export.export_command import export
    from sparse_lora_dist.export.export_options import load_request

    before, started = forget_peak(), time.perf_counter()
    export(load_request(words))
    print(json.dumps({"peak": peak_bytes() - before, "s": time.perf_counter() - started}))


def report(found: dict[str, dict[str, float]]) -> str:
    """Markdown."""
    merged = found["merged, bf16"]["s"]
    lines = [
        "`python benchmarks/exporting.py`: a random Llama of 1.1 B parameters in bf16, NF4, an "
        "adapter of rank 16 on all linears. Memory above what the process held after imports.",
        "",
        *header("peak memory", "time, of merging in bf16", first="format"),
    ]
    lines += [
        f"| {name} | {one['peak'] / 1e9:.2f} GB | {one['s'] / merged:.2f} |"
        for name, one in found.items()
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
