"""Turns results per example into numbers with 95% confidence intervals, as JSON and as a table.

``publish`` writes the files.
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sparse_lora_dist.distributed.phases import passes_later
from sparse_lora_dist.errors import UserError
from sparse_lora_dist.evaluation.eval_metrics import Measure
from sparse_lora_dist.evaluation.eval_options import bad_output
from sparse_lora_dist.evaluation.intervals import Interval, paired, ratio, wilson
from sparse_lora_dist.system.atomic_files import beside, write_new, write_whole

KEPT = "kept_"
"""Prefix of the name of results whose own name somebody else's file had taken meanwhile."""
MeasuresByName = Mapping[str, Measure]
"""Name of a result, e.g. "loss" -> the result of one model, kept per example."""
Number = dict[str, Any]
"""A number for JSON, as a dict with these keys:

    value       the number: an accuracy in [0, 1], a loss in nats per token, or a perplexity
    low, high   ends of its 95% confidence interval, or None
    examples    number of examples
    tokens      number of scored tokens; only of a loss, not of a difference
"""


def results(measured: Sequence[tuple[str, MeasuresByName]]) -> dict[str, Any]:
    """Return the results of every model and their differences from the first model.

    Args:
        measured: (adapter name, {result name: result}) of each model, all over the same examples.

    Returns:
        The content of the --output file without its settings, as a dict with two keys:

        "results": list of {"adapter": name, "measures": {result name: number}}, one per model.
        "differences": list of {"adapter": name, "from": name of the first adapter, "measures":
        {result name: number}}, one for each model after the first. Each number is the model's
        minus the first model's.

        ``Number`` describes a number.
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
    """Return result name -> number for one model; a loss adds the result "perplexity"."""
    numbers = {}
    for name, m in measures.items():
        interval = wilson(math.fsum(m.sums), len(m.sums)) if m.is_accuracy else None
        numbers[name] = _number(m.sums, m.weights, interval or ratio(m.sums, m.weights))
        if not m.is_accuracy:
            numbers["perplexity"] = _exponential(numbers[name])
            numbers[name]["tokens"] = int(math.fsum(m.weights))
    return numbers


def _differences(measures: MeasuresByName, base: MeasuresByName) -> dict[str, Number]:
    """Return the difference of each result between a model and the first model.

    Differences are paired: examples that are hard for both models do not widen the interval.

    Args:
        measures: Results of the model.
        base: Results of the first model, which are subtracted.

    Returns:
        Result name -> difference, with its 95% interval.
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

    Args:
        measured: (adapter name, {result name: result}) of each model.

    Returns:
        JSON lines with the keys "adapter", "measure" (name of the result), "example" (index of the
        example, counted from 0) and "value": its loss in nats, summed over its tokens, or 1.0 for a
        right and 0.0 for a wrong answer. A loss adds the key "tokens", the number of tokens, and
        a metric that generates adds the key "said", the model's answer, and the key "generated",
        the whole generated text, if that is more.
    """
    rows = [
        {"adapter": adapter, "measure": name, "example": i, "value": value}
        | ({"tokens": int(m.weights[i])} if not m.is_accuracy else {})
        | ({"said": m.texts[i]} if m.texts else {})
        | ({"generated": m.generated[i]} if m.texts and m.generated[i] != m.texts[i] else {})
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
    """Return the perplexity of a loss: the exponentials of its value and of its interval's ends."""
    return {k: v if k == "examples" or v is None else _exp(v) for k, v in number.items()}


def _exp(loss: float) -> float | None:
    """Return e to the power of ``loss``; None if no float is so large."""
    try:
        return math.exp(loss)
    except OverflowError:
        return None


def as_text(content: Mapping[str, Any]) -> str:
    """Return a text table to print, with one line for each result and each difference.

    Args:
        content: The return value of ``results``.
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
    value, low, high = (
        None if number[key] is None else f"{number[key]:{sign}.4f}"
        for key in ("value", "low", "high")
    )
    interval = "" if low is None else f"{low} to {high or 'infinity'}"
    return name, value or "infinity", interval, f"{number['examples']:,}"


def publish(texts: Mapping[str, str], files: Mapping[str, Path], *, overwrite: bool) -> None:
    """Write the result files. A file that came under such a name meanwhile, or that the system
    does not let this process replace, stays: the results are then written beside it, under another
    name.

    Args:
        texts: Option, without dashes -> content of its file.
        files: Option -> path of its file.
        overwrite: True if a file that evaluation wrote earlier may be replaced.

    Raises:
        UserError: Some results have another name than was asked for. The message names them.
        OSError: The folder cannot be written, or storage fails in a way that may pass.
    """
    new = [files[flag] for flag in texts if not os.path.lexists(files[flag])]
    written = []
    try:
        for flag, text in texts.items():
            written.append(_publish(flag, files[flag], text, overwrite))
    except OSError:  # both or none, so that the same command works later
        for flag, problem in zip(texts, written, strict=False):
            if problem is None and files[flag] in new:
                files[flag].unlink(missing_ok=True)
        raise
    if problems := [problem for problem in written if problem]:
        raise UserError("\n".join(problems))


def _publish(flag: str, path: Path, text: str, overwrite: bool) -> str | None:
    """Write one result file. Return a message if it was written under another name."""
    why = "was put there by somebody else during the evaluation, so it is not replaced"
    try:
        if overwrite and os.path.lexists(path) and not bad_output(flag, path, overwrite=True):
            write_whole(path, text)
        else:
            write_new(path, text)
        return None
    except FileExistsError:
        pass
    except OSError as error:
        if error.errno is None or passes_later(error):  # the same command may write both later
            raise
        why = f"cannot be written: {os.strerror(error.errno)}"
    kept = beside(path, KEPT)
    write_new(kept, text)
    return f"--{flag} {path} {why}. The results are in {kept}. Move one of the two."
