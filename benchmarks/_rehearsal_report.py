"""Report of ``rehearsal_70b.py``: text, table and plot."""

from pathlib import Path
from typing import Any

from _job import header
from matplotlib.figure import Figure

Found = list[dict[str, Any]]
"""A row a rank that was rehearsed."""

GB = 1e9
DISK_GB_PER_S = 1.0
"""What a machine reads; the planner's default rate."""
RANKS_PER_MACHINE = 8


def table(found: Found) -> str:
    """Markdown, a row a rank."""
    names = ["read", "from disk at 1 GB/s a machine of 8", "quantising, of its time"]
    names += ["shard", "planned", "peak", "planned"]
    lines = header(*names, first="rank")
    for row in found:
        disk = row["bytes_read"] * min(RANKS_PER_MACHINE, row["ranks"]) / (DISK_GB_PER_S * GB)
        cells = [f"{row['bytes_read'] / GB:.2f} GB", f"{disk:.0f} s"]
        cells += [f"{row['quantise_s'] / row['seconds']:.0%}"]
        for what in ("shard", "peak"):
            own, plan = row[what], row[f"planned_{what}"]
            cells += [f"{own / GB:.3f} GB", f"{plan / GB:.3f} GB ({plan / own - 1:+.1%})"]
        lines.append(f"| {row['rank']} of {row['ranks']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def report(found: Found) -> str:
    """The result file."""
    checked: dict[str, list[str]] = {}
    for name, against in found[0]["checked"].items():
        checked.setdefault(against, []).append(f"`{name}`")
    checks = "\n".join(f"- {against}: {', '.join(names)}" for against, names in checked.items())
    return f"""\
`python benchmarks/rehearsal_70b.py`: one rank of a job of so many loads its shard of a checkpoint
of Llama-3-70B's shape, NF4 with double quantisation and LoRA of rank 16 on all linears, on a CPU.
The files are holes but for one tensor of each shape; holes are read from memory, so the time from
disk is bytes over a stated rate. Peak is resident bytes, mapped files included, above what the
process held after imports and the start of its group.

{table(found)}

The other ranks are stood in for, as `_one_of_many.py` says: all-gathers bring this rank's own
scales, broadcasts its own means. Of one random tensor of each shape this rank's part is compared
bit for bit, scales made once more with what the other ranks would really send, with its part of

{checks}"""


def plot(found: Found, file: Path) -> None:
    """Shard and peak, measured and planned, of the rank that needed most."""
    figure = Figure(figsize=(6, 3.2), layout="constrained")
    axes = figure.subplots()
    sizes = sorted({row["ranks"] for row in found})
    for shift, (what, label) in enumerate(
        [("shard", "shard"), ("peak", "peak while loading"), ("planned_peak", "peak, planned")]
    ):
        most = [max(row[what] for row in found if row["ranks"] == n) / GB for n in sizes]
        bars = axes.bar([i + 0.28 * shift for i in range(len(sizes))], most, 0.26, label=label)
        axes.bar_label(bars, fmt="%.2f", fontsize=8)
    axes.set_xticks([i + 0.28 for i in range(len(sizes))], [f"{n} ranks" for n in sizes])
    axes.set(title="70B in 4 bit, one rank, GB")
    axes.legend(frameon=False)
    figure.savefig(file, dpi=120)
