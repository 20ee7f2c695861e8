"""Report of ``step.py``: figures, tables and plot."""

from pathlib import Path
from statistics import median
from typing import Any

from _job import header

TOKENS, RANK = 512, 16
WAYS = ("ours", "usual")
SHAPE = {"width": 768, "inner": 2048, "layers": 10, "vocabulary": 24000}
SMALL = SHAPE | {"layers": 1, "vocabulary": 4000}


def figures(time: dict[str, Any], peaks: dict[str, dict[str, int]]) -> dict[str, Any]:
    """What is kept of one case: ratios of rounds, bytes and counts. Seconds of a shared machine
    say nothing."""
    steps = time["steps"]
    pairs = list(zip(steps["usual"], steps["ours"], strict=True))
    rounds = {key: [round(u[key] / o[key], 3) for u, o in pairs] for key in ("clock", "processor")}
    return {
        "tokens_per_s_ours_by_usual": {key: round(median(r), 3) for key, r in rounds.items()},
        "rounds": rounds,
        "first_loss": time["first_loss"],
        **{way: {**traffic_of(time["traffic"][way]), **peaks[way]} for way in WAYS},
    }


def traffic_of(received: dict[str, dict[str, int]]) -> dict[str, int]:
    """Gathers, and the rest, of a step."""
    gathers = [t for name, t in received.items() if "gather" in name]
    others = [t for name, t in received.items() if "gather" not in name]
    return {
        "gathered": sum(t["bytes"] for t in gathers),
        "gathers": sum(t["calls"] for t in gathers),
        "reduced": sum(t["bytes"] for t in others),
    }


def report(found: dict[str, Any]) -> str:
    """The result file."""
    speed = header("ours / usual, tokens/s", "by processor time", "ours faster in", first="")
    memory = header("way", "loading", "engine", "training", "gathered a step", "in calls", first="")
    for name, case in found.items():
        ratio, rounds = case["tokens_per_s_ours_by_usual"], case["rounds"]["clock"]
        faster = f"{sum(r >= 1.0 for r in rounds)} of {len(rounds)} rounds"
        speed.append(f"| {name} | {ratio['clock']:.2f} | {ratio['processor']:.2f} | {faster} |")
        for way in WAYS:
            own = case[way]
            sizes = [own[k] / 1e6 for k in ("loading", "engine", "training", "gathered")]
            cells = [way, *(f"{size:,.0f} MB" for size in sizes), f"{own['gathers']:,}"]
            memory.append(f"| {name} | {' | '.join(cells)} |")
    lines = "\n".join
    return f"""\
`python benchmarks/step.py`: LoRA of rank {RANK} on all linears of a random Llama over NF4 with
double quantisation, one row of {TOKENS} tokens a rank, CPU ranks of one thread. ZeRO-3 of both as
in `ds_configs/zero3.json`, its limits on what stays gathered cut as the model is, to about a
layer and a half. {described(SHAPE)}; in bf16 {described(SMALL)}.
Usual: transformers + bitsandbytes + PEFT. Both engines stand in the same processes; medians of
rounds in which each makes a step.

{lines(speed)}

This machine multiplies bf16 without instructions for it: in fp32 both ways spend their time on the
same matmuls, in bf16 on whatever loop torch has for a layout, and there ours multiplies in fp32 for
backward. So the bf16 row says something about such CPUs, and nothing about GPUs.

Peak resident memory above the start of the rank that needed most, until loaded, until the engine
stands, and while training; bytes that all-gathers bring to one rank in one step:

{lines(memory)}"""


def described(shape: dict[str, int]) -> str:
    """In words."""
    width, inner, layers, vocabulary = shape.values()
    size = layers * (3 * width * width + 3 * width * inner) + 2 * width * vocabulary
    return (
        f"{size / 1e6:.0f} M parameters, {layers} layers of width {width} and {inner}, "
        f"{vocabulary:,} tokens"
    )


def plot(found: dict[str, Any], file: Path) -> None:
    """Speed and training peak, ours in the usual way's."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(10, 0.5 * len(found) + 1.6), sharey=True)
    values = {
        "tokens/s, ours / usual": [
            case["tokens_per_s_ours_by_usual"]["clock"] for case in found.values()
        ],
        "training peak, ours / usual": [
            case["ours"]["training"] / case["usual"]["training"] for case in found.values()
        ],
    }
    for panel, (title, numbers) in zip(panels, values.items(), strict=True):
        bars = panel.barh(list(found), numbers, color="#4878a8")
        panel.bar_label(bars, fmt="%.2f", padding=3)
        panel.axvline(1.0, color="black", linewidth=0.8)
        panel.set_title(title)
        panel.set_xlim(0, 1.15 * max(*numbers, 1.0))
    panels[0].invert_yaxis()
    figure.tight_layout()
    figure.savefig(file, dpi=120)
