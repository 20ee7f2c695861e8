"""Quality against the size of an adapter: methods x budgets x seeds, on two tasks.

    python benchmarks/study.py [gsm8k|cola] [FOLDER of CoLA]

gsm8k: held-out loss of the embedded model on its slice of GSM8K. cola: Matthews correlation on dev
of a random encoder (data as in cola.py). All runs of a task have the same steps, rows and learning
rate. Every finished run is kept in results/study.json, so the script can be interrupted and started
again.
"""

import json
import resource
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from _job import RESULTS, data_folder, header, stored, train, write
from cola import OPTIONS, random_encoder
from methods import acting
from safetensors.torch import load_file

SEEDS = (0, 1, 2)
BUDGETS: dict[str, list[dict[str, str]]] = {
    "lora": [{"rank": "1"}, {"rank": "4"}, {"rank": "16"}],
    "adalora": [{"adalora_target_rank": n} for n in ("1", "4", "8")],
    "increlora": [{"increlora_target_rank": n} for n in ("2", "4", "8")],
    "sora": [{"sora_lambdas": n} for n in ("0.2", "1", "3")],
    "roselora": [{"roselora_keep": n} for n in ("0.02", "0.05", "0.2")],
}
GSM8K = {"max_steps": "60", "learning_rate": "1e-2", "eval_every": "0"}
Row = dict[str, Any]


def main() -> None:
    """What is missing of one task or both, and the tables of all there is."""
    words = [word for word in sys.argv[1:] if word in TASKS]
    sys.argv[1:] = [word for word in sys.argv[1:] if word not in TASKS]
    found: list[Row] = stored("study.json") or []
    for task in words or TASKS:
        for row in TASKS[task](found):
            found.append(row)
            print(row, flush=True)
            (RESULTS / "study.json").write_text(json.dumps(found, indent=1) + "\n")
    write("study.md", report(found))
    plot(found, RESULTS / "study.png")


def on_gsm8k(found: list[Row]) -> Iterator[Row]:
    """The embedded job."""
    for method, budget, seed in missing("gsm8k", found):
        yield one("gsm8k", method, budget, seed, GSM8K, lambda row: row["held_out_loss"])


def on_cola(found: list[Row]) -> Iterator[Row]:
    """Two epochs of CoLA."""
    folder = data_folder("cola", "holds CoLA's train.tsv and dev.tsv")
    if folder is None:
        return
    lines = (folder / "train.tsv").read_text().splitlines()
    with tempfile.TemporaryDirectory() as place:
        base = random_encoder(Path(place), [line.split("\t")[3] for line in lines])
        data = {"data": folder / "train.tsv", "eval_data": folder / "dev.tsv", "model": base}
        options = {k: str(v) for k, v in {**OPTIONS, **data, "num_epochs": 2}.items()}
        for method, budget, seed in missing("cola", found):
            yield one("cola", method, budget, seed, options, lambda row: row["held_out_matthews"])


TASKS = {"gsm8k": on_gsm8k, "cola": on_cola}


def missing(task: str, found: list[Row]) -> Iterator[tuple[str, dict[str, str], int]]:
    """Every run of the grid that is not there yet, all budgets with a seed before the next seed."""
    done = {(row["task"], row["method"], row["budget"], row["seed"]) for row in found}
    for seed in SEEDS:
        for method, budgets in BUDGETS.items():
            for budget in budgets:
                if (task, method, said(budget), seed) not in done:
                    yield method, budget, seed


def said(budget: dict[str, str]) -> str:
    """rank 4"""
    return ", ".join(f"{name} {value}" for name, value in budget.items())


def one(
    task: str,
    method: str,
    budget: dict[str, str],
    seed: int,
    options: dict[str, str],
    metric: Callable[[Row], float],
) -> Row:
    """A run: what it reached, what it costs."""
    flags = {"method": method, "seed": str(seed), **options, **budget}
    before = processor_seconds()
    with tempfile.TemporaryDirectory() as folder:
        words = [word for name, value in flags.items() for word in (f"--{name}", value)]
        rows = train(*words, folder=folder)
        file = Path(folder) / "adapter" / "adapter_model.safetensors"
        # A run of which nothing lives writes none, and says so.
        weights = load_file(file) if file.exists() else {}
        size = file.stat().st_size if file.exists() else 0
    scored = [row for row in rows if row.get("held_out_loss") is not None]
    return {
        "task": task,
        "method": method,
        "budget": said(budget),
        "seed": seed,
        "before": metric(scored[0]),
        "score": metric(scored[-1]),
        "parameters": acting(weights),
        "bytes": size,
        "seconds": processor_seconds() - before,
    }


def processor_seconds() -> float:
    """Of all that this program started and that has ended: beside others' work on a shared machine
    it stays what it is, which the clock does not."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


WHAT = {
    "gsm8k": "held-out loss, nats a token (lower is better)",
    "cola": "Matthews correlation on dev (higher is better)",
}


def report(found: list[Row]) -> str:
    """Markdown, a table a task."""
    parts = [
        "`python benchmarks/study.py`: methods x budgets x 3 seeds on 2 CPU ranks; rank 16 where no"
        " other is said, all linears. Parameters: entries of the exported adapter that act. Bytes: "
        "the adapter's file. Time: the whole program's on processors, of plain LoRA's of rank 16 "
        "in the same task."
    ]
    for task, what in WHAT.items():
        own = [row for row in found if row["task"] == task]
        if own:
            parts += ["", f"{task}: {what}; {own[0]['before']:.3f} before training.", ""]
            parts += header("score", "parameters", "bytes", "time", first="method, budget")
            parts += list(lines(own))
    return "\n".join(parts)


def lines(rows: list[Row]) -> Iterator[str]:
    """One a budget: mean and spread over seeds."""
    usual = mean(r["seconds"] for r in rows if r["method"] == "lora" and r["budget"] == "rank 16")
    for method, budgets in BUDGETS.items():
        for budget in budgets:
            own = [r for r in rows if (r["method"], r["budget"]) == (method, said(budget))]
            if not own:
                continue
            scores = [r["score"] for r in own]
            spread = f" ± {stdev(scores):.3f}" if len(scores) > 1 else ""
            yield (
                f"| {method}, {said(budget)} | {mean(scores):.3f}{spread} | "
                f"{mean(r['parameters'] for r in own):,.0f} | {mean(r['bytes'] for r in own):,.0f} "
                f"| {mean(r['seconds'] for r in own) / usual:.2f} |"
            )


def plot(found: list[Row], path: Path) -> None:
    """Score against parameters that act, a line a method."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    tasks = [task for task in WHAT if any(row["task"] == task for row in found)]
    figure, all_axes = plt.subplots(1, len(tasks), figsize=(5.5 * len(tasks), 4), squeeze=False)
    for axes, task in zip(all_axes[0], tasks, strict=True):
        for method, budgets in BUDGETS.items():
            points = []
            for budget in budgets:
                own = [r for r in found if (r["task"], r["method"]) == (task, method)]
                own = [r for r in own if r["budget"] == said(budget)]
                if own:
                    scores = [r["score"] for r in own]
                    spread = stdev(scores) if len(scores) > 1 else 0.0
                    points.append((mean(r["parameters"] for r in own), mean(scores), spread))
            if points:
                x, y, error = zip(*sorted(points), strict=True)
                axes.errorbar(x, y, yerr=error, marker="o", capsize=3, label=method)
        axes.set_xscale("log")
        axes.set_xlabel("parameters that act")
        axes.set_ylabel(WHAT[task])
        axes.set_title(task)
        axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
