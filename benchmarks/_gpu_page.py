"""The page of results of ``gpu_check.py``."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from _gpu_runner import Row
from _job import header

STEPS = ("tokens/s", "of PEFT's", "peak GB", "of PEFT's", "reserved GB")
STEPS += ("s a step", "host s", "short step s", "loading s", "loss")
WAYS = {"peft": "PEFT + bitsandbytes"}


def name_of(rows: Sequence[Row]) -> str | None:
    """Return the page's file name, which has the device's; None if no GPU is in the records."""
    device = _facts(rows).get("device")
    return f"gpu_{re.sub(r'[^a-z0-9]+', '_', device.lower()).strip('_')}.md" if device else None


def page(rows: Sequence[Row]) -> str:
    """Return the page: the machine, steps beside PEFT's, and the other parts' last records."""
    facts, ends = _facts(rows), {row["part"]: row for row in rows if "ended" in row}
    versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
    sections = [
        f"`python benchmarks/gpu_check.py` on one GPU, commit {facts['commit']}.",
        f"{facts['device']} ({facts['device_bytes'] / 1e9:.0f} GB), driver {facts['driver']}, "
        f"CUDA {facts['cuda']}, NCCL {facts['nccl']}, {facts['cores']} cores, Python "
        f"{facts['python']}; {versions}. Importing the project took {facts['import_s']} s.",
        "## Steps\n\n" + STEPS_NOTE,
        steps_table(rows),
        "## The rest\n",
        "\n".join(_others(rows)),
        "## How each part ended\n",
        "\n".join(_ends(ends)),
    ]
    return "\n\n".join(sections)


STEPS_NOTE = """\
Random weights of Llama-3's shapes in NF4 with double quantisation, random tokens, LoRA of rank 16
on all linears (other methods: a decision at every second step), activation checkpointing, bf16. The
first two steps are not counted. PEFT trains without DeepSpeed, its adapter in bf16; this project
keeps fp32 masters. "host s" are processor seconds of the process a step, of which those spent
waiting for the GPU are a part; a short step has 16 tokens, so its time is the host's."""


def steps_table(rows: Sequence[Row]) -> str:
    """Return the table of timed steps, with ratios to PEFT's of the same shape and rows."""
    timed = {_key(row): row for row in rows if "tokens_per_s" in row}
    reference = {_case(row): row for row in timed.values() if row["way"] == "peft"}
    lines = header(*STEPS, first="shape, rows x tokens, way")
    for row in timed.values():
        peft = reference.get(_case(row)) if row["way"] != "peft" else None
        lines.append(f"| {_first(row)} | {' | '.join(_figures(row, peft))} |")
    return "\n".join(lines)


def _key(row: Row) -> tuple[Any, ...]:
    return row["part"], row["way"], row["engine"], *_case(row)


def _case(row: Row) -> tuple[Any, ...]:
    return row["shape"], row["rows"], row["tokens"], row["documents"]


def _first(row: Row) -> str:
    way = WAYS.get(row["way"], f"{row['way']}, {row['engine']}.json")
    packed = f", {row['documents']} documents a row" if row["documents"] > 1 else ""
    return f"{row['shape']}, {row['rows']} x {row['tokens']}{packed}, {way}"


def _figures(row: Row, peft: Row | None) -> list[str]:
    def ratio(key: str) -> str:
        return f"{row[key] / peft[key]:.2f}" if peft and row[key] and peft[key] else ""

    def size(key: str) -> str:
        return f"{row[key] / 1e9:.2f}" if row[key] else ""

    loss = f"{row['loss'][0]} -> {row['loss'][1]}" + ("" if row["finite"] else ", NOT FINITE")
    times = ", ".join(f"{seconds:.2f}" for seconds in row["step_s"])
    return [
        *(f"{row['tokens_per_s']:.0f}", ratio("tokens_per_s")),
        *(size("peak_bytes"), ratio("peak_bytes"), size("reserved_bytes")),
        *(times, f"{row['host_s']:.2f}", f"{row['short_step_s']:.3f}"),
        *(f"{row['load_s']}", loss),
    ]


def _facts(rows: Sequence[Row]) -> Row:
    return next((row for row in reversed(rows) if "versions" in row), {})


def _others(rows: Sequence[Row]) -> list[str]:
    """A line for each record that is neither of timed steps nor of an end."""
    lines = []
    for row in rows:
        if not row.keys() & {"ended", "tokens_per_s", "versions"}:
            shown = row.keys() - {"part", "error", "said"}
            figures = ", ".join(f"{key} {row[key]}" for key in row if key in shown)
            lines.append(f"- {row['part']}: {figures or row['error'].strip().splitlines()[-1]}")
    return lines


def _ends(ends: dict[str, Row]) -> list[str]:
    return [
        f"- {part}: {row['ended']}"
        + (f" ({row['why']})" if "why" in row else "")
        + (f", {row['seconds']} s" if "seconds" in row else "")
        for part, row in ends.items()
    ]


def write_page(rows: Sequence[Row], *folders: Path) -> None:
    """Write the page into each folder, if the records have a GPU."""
    if name := name_of(rows):
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(page(rows) + "\n")
            print("written:", folder / name)
