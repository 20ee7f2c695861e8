"""Report of ``load.py``: text, table and plot."""

import os
from pathlib import Path
from typing import Any

from _job import header
from matplotlib.figure import Figure

Found = dict[str, dict[str, dict[str, Any]]]
"""By ranks and way, of the rank that needed most: until loaded (``loading_``) and until the engine
stands (``ready_``) seconds, processor seconds and peak bytes above the start; bytes of its shard of
the base and of its part of the largest tensor."""

GB = 1e9
ALLOWANCE = 0.15 * GB


def bound(own: dict[str, Any]) -> float:
    """Most bytes that loading may hold: shard and a rank's part of the largest tensor, 10% and
    0.15 GB more."""
    return 1.1 * (own["shard"] + own["part_of_largest"]) + ALLOWANCE


def table(found: Found) -> str:
    """Markdown, a row a number of ranks."""
    names = [
        "usual time / ours",
        "loading, usual",
        "loading, ours",
        "bound",
        "shard of the base",
    ]
    lines = header(*names, "engine, usual", "engine, ours", first="ranks")
    for ranks, ways in found.items():
        own, other = ways["ours"], ways["usual"]
        sizes = [other["loading_peak"], own["loading_peak"], bound(own), own["shard"]]
        sizes += [other["ready_peak"], own["ready_peak"]]
        times = f"{other['ready_s'] / own['ready_s']:.1f}"
        lines.append(f"| {ranks} | {times} | {' | '.join(f'{n / GB:.2f} GB' for n in sizes)} |")
    return "\n".join(lines)


def report(found: Found) -> str:
    """The result file."""
    return f"""\
`python benchmarks/load.py`: a random Llama of 1.1 B parameters in bf16, to an NF4 base sharded by
ZeRO-3 with LoRA of rank 16 on all linears and an engine that could train; {os.cpu_count()} cores,
one thread a rank, files in the page cache. Time is until the engine stands. Peaks are resident
bytes, mapped files included, of the rank that needed most, above what it held after imports and
`init_distributed`: until all is loaded, and until the engine stands. Bound: 1.1 x (shard + a rank's
part of the largest tensor in the files) + 0.15 GB.

{table(found)}

Our time on {", ".join(found)} ranks, in that on {next(iter(found))}: {_falling(found)}."""


def _falling(found: Found) -> str:
    first = next(iter(found.values()))["ours"]["ready_s"]
    return ", ".join(f"{ways['ours']['ready_s'] / first:.2f}" for ways in found.values())


def plot(found: Found, file: Path) -> None:
    """Peaks while loading beside the bound, and times in our time on the fewest ranks."""
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    memory, times = figure.subplots(1, 2)
    first = next(iter(found.values()))["ours"]["ready_s"]
    for shift, way in enumerate(("ours", "usual")):
        places = [i + 0.38 * shift for i in range(len(found))]
        peaks = [ways[way]["loading_peak"] / GB for ways in found.values()]
        seconds = [ways[way]["ready_s"] / first for ways in found.values()]
        memory.bar(places, peaks, 0.36, label=way)
        times.bar(places, seconds, 0.36, label=way)
    for place, ways in enumerate(found.values()):
        height = bound(ways["ours"]) / GB
        label = "bound" if place == 0 else None
        memory.hlines(height, place - 0.2, place + 0.2, colors="black", label=label)
    highest = max(ways["usual"]["loading_peak"] / GB for ways in found.values())
    memory.set(title="peak of the worst rank while loading, GB", ylim=(0, 1.2 * highest))
    most = max(ways["usual"]["ready_s"] / first for ways in found.values())
    title = f"time to an engine, ours on {next(iter(found))} = 1"
    times.set(title=title, ylim=(0, 1.2 * most))
    for axes in (memory, times):
        axes.set_xticks([i + 0.19 for i in range(len(found))], list(found))
        axes.set_xlabel("ranks")
        axes.legend(frameon=False, ncols=3, loc="upper left")
    figure.savefig(file, dpi=120)
