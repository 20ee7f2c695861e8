"""All methods at about the same number of parameters that train, side by side.

    make bench-methods

The embedded model and its slice of GSM8K; rank 4 of plain LoRA sets the number. Every run is kept
in results/family.json as it ends: started again, the script makes what is missing.
"""

import json
import tempfile
from collections.abc import Iterator
from math import prod
from pathlib import Path
from statistics import harmonic_mean, mean, stdev
from typing import Any

from _job import RESULTS, header, stored, train, write

SEEDS = (0, 1, 2)
OPTIONS: dict[str, dict[str, str]] = {
    "lora": {"rank": "4"},
    "adalora": {"adalora_target_rank": "4"},
    "increlora": {"increlora_target_rank": "4"},
    "sora": {"sora_lambdas": "1.2"},
    "roselora": {"roselora_keep": "0.25"},
    "shira": {"rank": "4"},
    "sbora": {"rank": "8"},
    "melora": {"rank": "4", "melora_blocks": "4"},
    "lora_mini": {"rank": "16", "lora_mini_size": "65"},
    "mora": {"rank": "4"},
    "prilora": {"rank": "4"},
    "neat": {"rank": "4"},
    "cola": {"rank": "4"},
    "lorta": {"rank": "192", "target_modules": "q_proj,o_proj"},
    "pst": {"rank": "2", "pst_score_rank": "1"},
    "losa": {"rank": "4"},
    "sara": {"rank": "4"},
}
"""What brings each to LoRA's number; rank 16 where none is said. Where pieces or entries die, at
the end of the run."""
JOB = {"max_steps": "40", "learning_rate": "1e-2", "eval_every": "0"}
RATES = {"pst": "1e-3"}
"""Learning rates of methods for which the others' is far off: PST's U begins at N(0, 1)."""
Row = dict[str, Any]


def main() -> None:
    """What is missing, then the table and the plot of all there is."""
    found: list[Row] = stored("family.json") or []
    for method, seed in missing(found):
        found.append(one(method, seed))
        print(found[-1], flush=True)
        (RESULTS / "family.json").write_text(json.dumps(found, indent=1) + "\n")
    write("family.md", report(found))
    plot(found, RESULTS / "family.png")


def missing(found: list[Row]) -> Iterator[tuple[str, int]]:
    """All methods with a seed before the next seed."""
    done = {(row["method"], row["seed"]) for row in found}
    yield from ((m, seed) for seed in SEEDS for m in OPTIONS if (m, seed) not in done)


def one(method: str, seed: int) -> Row:
    """A run: what it reached, what it took."""
    flags = {"method": method, "seed": str(seed), **JOB, **OPTIONS[method]}
    flags["learning_rate"] = RATES.get(method, JOB["learning_rate"])
    with tempfile.TemporaryDirectory() as folder:
        words = [word for name, value in flags.items() for word in (f"--{name}", value)]
        rows = train(*words, folder=folder)
        newest = max((Path(folder) / "checkpoints").glob("step_*/manifest.json"))
        shapes = json.loads(newest.read_text())["tensors"].values()
    losses = [row["held_out_loss"] for row in rows if row.get("held_out_loss") is not None]
    trained = [row for row in rows if "tokens_per_s" in row]
    return {
        "method": method,
        "seed": seed,
        "before": losses[0],
        "held_out": losses[-1],
        "parameters": sum(map(prod, shapes)),
        "live": rows[-1]["live_entries"],
        "peak_memory_bytes": max(row.get("peak_memory_bytes", 0) for row in rows),
        # Not the first step's, in which much is set up.
        "seconds_per_token": 1 / harmonic_mean([row["tokens_per_s"] for row in trained[1:]]),
    }


def report(found: list[Row]) -> str:
    """Markdown, a line a method."""
    lines = [
        f"`make bench-methods`: {JOB['max_steps']} steps of 8 rows at {JOB['learning_rate']}, 2 CPU"
        f" ranks, {len(SEEDS)} seeds; {found[0]['before']:.3f} nats a token before; {rates()}. "
        "Options: `benchmarks/family.py`. Peak memory of a rank, and time of a step, with what the "
        "method does between two: in LoRA's.",
        "",
        *header("held-out loss", "parameters", "live at the end", "peak", "step", first="method"),
    ]
    usual = [row for row in found if row["method"] == "lora"]
    for method in OPTIONS:
        own = [row for row in found if row["method"] == method]
        if not own:
            continue
        losses = [row["held_out"] for row in own]
        spread = f" ± {stdev(losses):.3f}" if len(losses) > 1 else ""
        relative = (
            mean(row[key] for row in own) / mean(row[key] for row in usual)
            for key in ("peak_memory_bytes", "seconds_per_token")
        )
        numbers = (f"{mean(row[key] for row in own):,.0f}" for key in ("parameters", "live"))
        cells = (f"{mean(losses):.3f}{spread}", *numbers, *(f"{r:.2f}" for r in relative))
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def rates() -> str:
    """Who has another learning rate."""
    return ", ".join(f"{method} at {rate}" for method, rate in RATES.items())


def plot(found: list[Row], path: Path) -> None:
    """Held-out loss against what lives at the end."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6.5, 4))
    for method in OPTIONS:
        own = [row for row in found if row["method"] == method]
        if own:
            losses = [row["held_out"] for row in own]
            spread = stdev(losses) if len(losses) > 1 else 0.0
            x, y = mean(row["live"] for row in own), mean(losses)
            axes.errorbar(x, y, yerr=spread, marker="o", capsize=3, linestyle="none")
            axes.annotate(method, (x, y), xytext=(6, 4), textcoords="offset points", size=8)
    axes.set(xscale="log", xlabel="live parameters at the end", ylabel="held-out loss")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
