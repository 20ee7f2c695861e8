"""Every method on the embedded model and data, with the same steps, tokens and rank.

    python benchmarks/methods.py

Each method takes the best of three learning rates by the held-out loss of seed 0, and then runs
with two more seeds.
"""

import tempfile
from pathlib import Path
from statistics import mean, stdev

import torch
from _job import held_out, train, write
from safetensors.torch import load_file

STEPS, RATES, SEEDS = 60, ("2e-3", "5e-3", "1e-2"), (0, 1, 2)
METHODS = ("lora", "roselora", "sora", "increlora", "adalora")


def run(method: str, rate: str, seed: int) -> tuple[float, float, int, int]:
    """Held-out loss before and after, parameters that act, optimizer state of a rank in bytes."""
    options = ["--method", method, "--learning_rate", rate, "--seed", str(seed)]
    options += ["--max_steps", str(STEPS), "--eval_every", "0"]
    with tempfile.TemporaryDirectory() as folder:
        rows = train(*options, folder=folder)
        weights = load_file(Path(folder) / "adapter" / "adapter_model.safetensors")
    return *held_out(rows), acting(weights), rows[-1]["state_bytes"]


def acting(weights: dict[str, torch.Tensor]) -> int:
    """Entries of rows of A and columns of B that are not zero, where neither of the two is."""
    count = 0
    for name, a_RI in weights.items():
        if name.endswith("lora_A.weight"):
            b_OR = weights[name.replace("lora_A", "lora_B")]
            a_R, b_R = (a_RI != 0).sum(1), (b_OR != 0).sum(0)
            count += int((a_R + b_R)[(a_R > 0) & (b_R > 0)].sum())
    return count


def main() -> None:
    """One row a method."""
    lines = [
        f"`python benchmarks/methods.py`: the embedded model and GSM8K slice, {STEPS} steps of 8 "
        "rows, rank 16, all linears, 2 CPU ranks, each method's defaults. Held-out loss in nats a "
        "token, over 3 seeds; learning rate: the best of "
        f"{', '.join(RATES)} by seed 0. Parameters: entries that act in the exported adapter. "
        "State: moments and live bits of a rank at the end.",
        "",
        "| method | rate | held-out loss | change | parameters | state, bytes |",
        "|---|---|---|---|---|---|",
    ]
    for method in METHODS:
        first = {rate: run(method, rate, SEEDS[0]) for rate in RATES}
        rate = min(first, key=lambda r: first[r][1])
        runs = [first[rate], *(run(method, rate, seed) for seed in SEEDS[1:])]
        losses, before = [after for _, after, _, _ in runs], runs[0][0]
        lines.append(
            f"| {method} | {rate} | {mean(losses):.3f} ± {stdev(losses):.3f} | "
            f"{100 * (mean(losses) / before - 1):+.1f}% | {mean(n for _, _, n, _ in runs):,.0f} | "
            f"{mean(s for *_, s in runs):,.0f} |"
        )
        print(lines[-1], flush=True)
    write("methods.md", "\n".join(lines))


if __name__ == "__main__":
    main()
