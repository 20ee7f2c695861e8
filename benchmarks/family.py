"""All methods with about the same number of trained parameters.

    make bench-methods

Runs use the embedded model and its slice of GSM8K. The number of parameters is that of plain LoRA
of rank 4. The learning rate of each method is searched with a seed that the comparison does not
use. Every finished run is kept in results/family.json, so the script can be interrupted and started
again.
"""

import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from math import inf, isfinite, prod
from pathlib import Path
from statistics import harmonic_mean, mean, stdev
from typing import Any

from _job import RESULTS, header, stored, train, write
from methods import acting
from safetensors.torch import load_file

SEEDS = (0, 1, 2)
LOOKING = 3
"""The seed with which a learning rate is looked for."""
RATES = ("3e-4", "1e-3", "3e-3", "1e-2", "3e-2", "1e-1", "3e-1")
FIRST = RATES.index("1e-2")
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
"""What brings each to LoRA's number; rank 16 where none is said. Where components or entries die,
at the end of the run."""
PRUNES_PAIRS = ("adalora", "increlora", "sora", "roselora", "prilora")
JOB = {"max_steps": "40", "eval_every": "0"}
Row = dict[str, Any]


def main() -> None:
    """What is missing, then the table and the plot of all there is."""
    found: list[Row] = stored("family.json") or []
    for case in missing(found):
        found.append(one(*case))
        print(found[-1], flush=True)
        (RESULTS / "family.json").write_text(json.dumps(found, indent=1) + "\n")
    write("family.md", report(found))
    plot(found, RESULTS / "family.png")


def missing(found: list[Row]) -> Iterator[tuple[str, int, str]]:
    """(method, seed, learning rate): rates first, then all methods with a seed before the next.
    ``found`` grows meanwhile."""
    for method in OPTIONS:
        while (rate := untried(looked(found, method))) is not None:
            yield method, LOOKING, rate
    done = {(row["method"], row["seed"]) for row in found}
    for seed in SEEDS:
        for method in OPTIONS:
            if (method, seed) not in done:
                yield method, seed, best(looked(found, method))


def looked(found: list[Row], method: str) -> dict[str, float]:
    """Learning rate -> held-out loss."""
    own = [row for row in found if (row["method"], row["seed"]) == (method, LOOKING)]
    return {row["learning_rate"]: row["held_out"] for row in own}


def best(losses: dict[str, float]) -> str:
    """The learning rate of least loss; one that is not finite is none."""
    return min(losses, key=lambda rate: losses[rate] if isfinite(losses[rate]) else inf)


def untried(losses: dict[str, float]) -> str | None:
    """The best and both its neighbours are tried."""
    at = RATES.index(best(losses)) if losses else FIRST
    near = [RATES[at], *RATES[max(at - 1, 0) : at], *RATES[at + 1 : at + 2]]
    return next((rate for rate in near if rate not in losses), None)


def one(method: str, seed: int, rate: str) -> Row:
    """A run: what it reached, what it took."""
    flags = {"method": method, "seed": str(seed), "learning_rate": rate, **JOB, **OPTIONS[method]}
    with tempfile.TemporaryDirectory() as folder:
        words = [word for name, value in flags.items() for word in (f"--{name}", value)]
        rows = train(*words, folder=folder)
        newest = max((Path(folder) / "checkpoints").glob("step_*/manifest.json"))
        shapes = json.loads(newest.read_text())["tensors"].values()
        live = rows[-1]["live_entries"]
        if method in PRUNES_PAIRS:
            live = that_act(Path(folder) / "adapter", live)
    losses = [row["held_out_loss"] for row in rows if row.get("held_out_loss") is not None]
    trained = [row for row in rows if "tokens_per_s" in row]
    return {
        "method": method,
        "seed": seed,
        "learning_rate": rate,
        "before": losses[0],
        "held_out": losses[-1],
        "parameters": sum(map(prod, shapes)),
        "live": live,
        "peak_memory_bytes": max(row.get("peak_memory_bytes", 0) for row in rows),
        # Not the first step's, in which much is set up.
        "seconds_per_token": 1 / harmonic_mean([row["tokens_per_s"] for row in trained[1:]]),
    }


def that_act(adapter: Path, live: int) -> int:
    """Of ``live`` entries of pairs those that do something: SoRA also steps those whose gate is
    zero, since it may open again, PRILoRA those of A that it zeroed."""
    return min(live, acting(load_file(adapter / "adapter_model.safetensors")))


@dataclass(frozen=True)
class Reached:
    """Of a method, over its seeds."""

    losses: list[float]
    rate: str
    parameters: float
    live: float
    peak: float
    """In LoRA's, as a step."""
    step: float

    @property
    def spread(self) -> float:
        """Standard deviation of the loss."""
        return stdev(self.losses) if len(self.losses) > 1 else 0.0


def reached(found: list[Row]) -> dict[str, Reached]:
    """By method, of the seeds that are reported."""
    rows = {m: [r for r in found if r["method"] == m and r["seed"] in SEEDS] for m in OPTIONS}

    def average(method: str, key: str) -> float:
        return mean(row[key] for row in rows[method])

    return {
        method: Reached(
            losses=[row["held_out"] for row in own],
            rate=own[0]["learning_rate"],
            parameters=average(method, "parameters"),
            live=average(method, "live"),
            peak=average(method, "peak_memory_bytes") / average("lora", "peak_memory_bytes"),
            step=average(method, "seconds_per_token") / average("lora", "seconds_per_token"),
        )
        for method, own in rows.items()
    }


def report(found: list[Row]) -> str:
    """Markdown, a line a method."""
    lines = [
        f"`make bench-methods`: {JOB['max_steps']} steps of 8 rows on 2 CPU ranks, "
        f"{len(SEEDS)} seeds; {found[0]['before']:.3f} nats a token before. Learning rate: of "
        f"{', '.join(RATES)} the best of another seed, its neighbours tried. "
        "Options: `benchmarks/family.py`. Peak memory of a rank, and time of a step, with what the "
        "method does between two: in LoRA's.",
        "",
        *header(
            "held-out loss",
            "learning rate",
            "parameters",
            "live at the end",
            "peak",
            "step",
            first="method",
        ),
    ]
    for method, own in reached(found).items():
        lines.append(
            f"| {method} | {mean(own.losses):.3f} ± {own.spread:.3f} | {own.rate} | "
            f"{own.parameters:,.0f} | {own.live:,.0f} | {own.peak:.2f} | {own.step:.2f} |"
        )
    return "\n".join(lines)


def plot(found: list[Row], path: Path) -> None:
    """Held-out loss of all, best first, and beside each what it costs."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 6))
    best_last = sorted(reached(found).items(), key=lambda item: -mean(item[1].losses))
    beside = {"transform": axes.get_yaxis_transform(), "va": "center"}
    for place, (method, own) in enumerate(best_last):
        loss = mean(own.losses)
        axes.errorbar(loss, place, xerr=own.spread, marker="o", capsize=3, color="C0")
        axes.text(-0.02, place, method, ha="right", **beside)
        axes.text(1.02, place, f"{own.live:,.0f} live, a step {own.step:.2f}", size=8, **beside)
    axes.set(xlabel="held-out loss, nats a token", yticks=[])
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=120, bbox_inches="tight")


if __name__ == "__main__":
    main()
