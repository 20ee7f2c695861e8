"""Turns measures into results with 95% confidence intervals, as JSON and as a table."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from sparse_lora_dist.evaluation.eval_metrics import Measure
from sparse_lora_dist.evaluation.intervals import Interval, paired, ratio, wilson

MeasuresByName = Mapping[str, Measure]
"""Result name -> measure of one model."""
Number = dict[str, Any]
"""A result for JSON, with the keys value, low, high (ends of the interval, or None), examples (a
count), and for a loss tokens (a count)."""


def results(measured: Sequence[tuple[str, MeasuresByName]]) -> dict[str, Any]:
    """Return the results of every model and their differences from the first model.

    Args:
        measured: (adapter name, its measures) of each model, all over the same examples.

    Returns:
        The content of the --output file except for its settings: "results" is a list of models, and
        "differences" a list of the models after the first.
    """
    first, base = measured[0]
    return {
        "results": [{"adapter": name, "measures": _numbers(m)} for name, m in measured],
        "differences": [
            {"adapter": name, "from": first, "measures": _differences(m, base)}
            for name, m in measured[1:]
        ],
    }


def _numbers(measures: MeasuresByName) -> dict[str, Number]:
    """Return result name -> result of one model; a loss adds the result "perplexity"."""
    numbers = {}
    for name, m in measures.items():
        interval = wilson(math.fsum(m.sums), len(m.sums)) if m.is_accuracy else None
        numbers[name] = _number(m.sums, m.weights, interval or ratio(m.sums, m.weights))
        if not m.is_accuracy:
            numbers["perplexity"] = _exponential(numbers[name])
            numbers[name]["tokens"] = int(math.fsum(m.weights))
    return numbers


def _differences(measures: MeasuresByName, base: MeasuresByName) -> dict[str, Number]:
    """Return result name -> difference between a model and the first model, ``base``.

    Differences are paired: examples that are hard for both models do not widen the interval.
    """
    differences = {}
    for name, m in measures.items():
        theirs = base[name].sums
        sums = [a - b for a, b in zip(m.sums, theirs, strict=True)]
        interval = paired(m.sums, theirs) if m.is_accuracy else ratio(sums, m.weights)
        differences[name] = _number(sums, m.weights, interval)
    return differences


def example_lines(measured: Sequence[tuple[str, MeasuresByName]]) -> str:
    """Return the content of the --answers file: one JSON line for each model, result and example.

    A line has the index of the example, counted from 0, and its value. For a loss it also has the
    number of tokens, and for metrics that generate the generated text (key "said").
    """
    rows = [
        {"adapter": adapter, "measure": name, "example": i, "value": value}
        | ({"tokens": int(m.weights[i])} if not m.is_accuracy else {})
        | ({"said": m.texts[i]} if m.texts else {})
        for adapter, measures in measured
        for name, m in measures.items()
        for i, value in enumerate(m.sums)
    ]
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _number(sums: Sequence[float], weights: Sequence[float], interval: Interval) -> Number:
    value = math.fsum(sums) / math.fsum(weights)
    low, high = interval or (None, None)
    return {"value": value, "low": low, "high": high, "examples": len(sums)}


def _exponential(number: Number) -> Number:
    """Return a result with the exponentials of its value and of both ends of its interval."""
    return {k: v if k == "examples" or v is None else math.exp(v) for k, v in number.items()}


def as_text(content: Mapping[str, Any]) -> str:
    """Return a text table with one line for each result and difference.

    Args:
        content: What ``results`` returned.
    """
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


def _cells(name: str, number: Number, sign: str = "") -> tuple[str, str, str, str]:
    low, high = number["low"], number["high"]
    interval = "" if low is None else f"{low:{sign}.4f} to {high:{sign}.4f}"
    return name, f"{number['value']:{sign}.4f}", interval, f"{number['examples']:,}"
