"""Measures -> numbers with 95% intervals, as JSON and as a table."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from sparse_lora_dist.evaluation.eval_metrics import Measure
from sparse_lora_dist.evaluation.intervals import Interval, paired, ratio, wilson

Named = Mapping[str, Measure]
"""The measures of one model, by name."""
Numbers = dict[str, Any]


def results(measured: Sequence[tuple[str, Named]]) -> dict[str, Any]:
    """Numbers of each model, and of each one's difference from the first."""
    first, base = measured[0]
    return {
        "results": [{"adapter": name, "measures": _numbers(m)} for name, m in measured],
        "differences": [
            {"adapter": name, "from": first, "measures": _differences(m, base)}
            for name, m in measured[1:]
        ],
    }


def _numbers(measures: Named) -> dict[str, Numbers]:
    numbers = {}
    for name, m in measures.items():
        interval = wilson(math.fsum(m.sums), len(m.sums)) if m.is_share else None
        numbers[name] = _number(m.sums, m.weights, interval or ratio(m.sums, m.weights))
        if not m.is_share:
            numbers["perplexity"] = _exponential(numbers[name])
            numbers[name]["tokens"] = int(math.fsum(m.weights))
    return numbers


def _differences(measures: Named, base: Named) -> dict[str, Numbers]:
    """Example by example, so that what is hard for both does not widen the interval."""
    differences = {}
    for name, m in measures.items():
        theirs = base[name].sums
        sums = [a - b for a, b in zip(m.sums, theirs, strict=True)]
        interval = paired(m.sums, theirs) if m.is_share else ratio(sums, m.weights)
        differences[name] = _number(sums, m.weights, interval)
    return differences


def each_example(measured: Sequence[tuple[str, Named]]) -> str:
    """JSON lines: of every model, measure and example, counted from 0, its number and what the
    model said."""
    rows = [
        {"adapter": adapter, "measure": name, "example": i, "value": value}
        | ({"tokens": int(m.weights[i])} if not m.is_share else {})
        | ({"said": m.said[i]} if m.said else {})
        for adapter, measures in measured
        for name, m in measures.items()
        for i, value in enumerate(m.sums)
    ]
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _number(sums: Sequence[float], weights: Sequence[float], interval: Interval) -> Numbers:
    value = math.fsum(sums) / math.fsum(weights)
    low, high = interval or (None, None)
    return {"value": value, "low": low, "high": high, "examples": len(sums)}


def _exponential(number: Numbers) -> Numbers:
    """Of the value and both ends."""
    return {k: v if k == "examples" or v is None else math.exp(v) for k, v in number.items()}


def as_text(content: Mapping[str, Any]) -> str:
    """A line a number."""
    rows = [("adapter", "measure", "value", "95% interval", "examples")]
    for one in content["results"]:
        rows += [(one["adapter"], *_cells(name, n)) for name, n in one["measures"].items()]
    for one in content["differences"]:
        label = f"{one['adapter']} - {one['from']}"
        rows += [(label, *_cells(name, n, "+")) for name, n in one["measures"].items()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def _cells(name: str, number: Numbers, sign: str = "") -> tuple[str, str, str, str]:
    low, high = number["low"], number["high"]
    interval = "" if low is None else f"{low:{sign}.4f} to {high:{sign}.4f}"
    return name, f"{number['value']:{sign}.4f}", interval, f"{number['examples']:,}"
