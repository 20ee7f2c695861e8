"""Writes the model card (README.md) of an export: its origin, figures, and code to load it."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path

import yaml

from sparse_lora_dist.export.sum_of_runs import Union
from sparse_lora_dist.export.trained_run import Trained
from sparse_lora_dist.model.prompting import TEMPLATE, Prompting
from sparse_lora_dist.run_folder.metrics_file import of_the_same_rows, read_records
from sparse_lora_dist.tasks import TASKS
from sparse_lora_dist.version import __version__

CARD, SIGNATURE = "README.md", "launcher/export.py."
HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", re.ASCII)
"""Name of a model of the hub."""
MARKDOWN = re.compile(r"[\\`*\[\]|<>&]")
"""Characters that mean something in a cell of a Markdown table."""


def write_card(
    trained: Trained, folder: Path, final: Path, kind: str, summary: Mapping[str, str]
) -> None:
    """Write README.md with the origin of an export, a table about it, and code that loads it.

    Names of models, data and folders are what somebody chose. They are quoted for each of the three
    places: YAML, the table, and Python.

    Args:
        trained: The exported run, or sum of runs.
        folder: Folder to write the card into, before it is moved to ``final``.
        final: Folder from which the card's code loads the export.
        kind: Value of ``--format``: peft, merged or sparse_delta.
        summary: Label -> text of each table row about this export, e.g. "sparsity". They follow
            the rows about the run, e.g. "base model".
    """
    config = trained.config
    about = {
        "base model": trained.base,
        "method": config.adapter.method,
        "trained on": config.data.data,
        "steps": f"{trained.step:,} of {trained.manifest['total_steps']:,}",
        "tokens": f"{trained.manifest['progress']['tokens']:,}",
        **_losses(trained),
        **_added_runs(trained),
        **summary,
    }
    # The hub takes no other names there than its own.
    front = ({"base_model": trained.base} if HUB_ID.fullmatch(trained.base) else {}) | {
        "library_name": "peft" if kind == "peft" else "transformers",
        "tags": ["sparse-lora-dist", "lora" if trained.is_lora else config.adapter.method],
    }
    lines = [
        "---",
        yaml.safe_dump(front, sort_keys=False, default_flow_style=None, width=2**31).rstrip(),
        "---",
        "",
        f"# {cell(Path(trained.base).name)}, fine-tuned with {config.adapter.method}",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {cell(text)} |" for name, text in about.items()),
        "",
        "```python",
        *_code(trained, final, kind),
        "```",
        "",
        f"Written by sparse_lora_dist {__version__}, {SIGNATURE}",
        "",
    ]
    (folder / CARD).write_text("\n".join(lines), encoding="utf-8")


def cell(text: str) -> str:
    """Return a text for a cell of a Markdown table, on one line, in which nothing is markup."""
    one_line = "".join(c if c.isprintable() else " " for c in text)
    return MARKDOWN.sub(lambda found: f"\\{found[0]}", one_line)


def _code(trained: Trained, final: Path, kind: str) -> list[str]:
    """Return the lines of Python that load an export.

    Args:
        trained: The exported run, or sum of runs.
        final: Folder of the export.
        kind: Value of ``--format``.
    """
    imports, loading = LOADING[kind](trained, repr(str(final)))
    if kind != "merged" and trained.prompting is not None:  # a merged model has it in its files
        more = _prompting_code(trained, trained.prompting, repr(str(final)))
        imports, loading = imports | more[0], loading + more[1]
    taken: dict[str, list[str]] = {}
    for name, module in imports.items():
        taken.setdefault(module, []).append(name)
    first = [f"from {module} import {', '.join(sorted(taken[module]))}" for module in sorted(taken)]
    return [*first, "", *loading]


Code = tuple[dict[str, str], list[str]]
"""(name that is imported -> its module, lines of code)."""


def _peft_code(trained: Trained, folder: str) -> Code:
    if trained.saved_class is not None:  # PEFT's automatic classes would take another one
        name, options = trained.saved_class.name, _revision(trained) + _trust(trained)
        return {name: "transformers", "PeftModel": "peft"}, [
            f'base = {name}.from_pretrained({trained.base!r}, dtype="auto"{options})',
            f"model = PeftModel.from_pretrained(base, {folder})",
        ]
    auto_class = f"AutoPeftModelFor{_kind(trained)}"
    options = _labels(trained) + _revision(trained) + _trust(trained)
    return {auto_class: "peft"}, [f"model = {auto_class}.from_pretrained({folder}{options})"]


def _merged_code(trained: Trained, folder: str) -> Code:
    auto_class = f"AutoModelFor{_kind(trained)}"
    call = f'{auto_class}.from_pretrained({folder}, dtype="auto"{_trust(trained)})'
    return {auto_class: "transformers"}, [f"model = {call}"]


def _delta_code(trained: Trained, folder: str) -> Code:
    auto_class = f"AutoModelFor{_kind(trained)}"
    options = _labels(trained) + _revision(trained) + _trust(trained)
    in_full = ", ".join(trained.manifest["full_modules"])
    note = f"  # without the trained weights of {in_full}" if in_full else ""
    imports = {
        "Path": "pathlib",
        auto_class: "transformers",
        "apply_sparse_delta": "sparse_lora_dist",
    }
    return imports, [
        f'model = {auto_class}.from_pretrained({trained.base!r}, dtype="auto"{options}){note}',
        f"applied = apply_sparse_delta(model, Path({folder}))",
        "applied.undo()  # restores every weight bit for bit",
    ]


LOADING: dict[str, Callable[[Trained, str], Code]] = {
    "peft": _peft_code,
    "merged": _merged_code,
    "sparse_delta": _delta_code,
}
"""Value of ``--format`` -> function (run, folder as a Python literal) that returns the code."""


def _prompting_code(trained: Trained, prompting: Prompting, folder: str) -> Code:
    options = _revision(trained) + _trust(trained)
    imports = {"AutoTokenizer": "transformers", "GenerationConfig": "transformers"}
    lines = [
        "# Answers end with the tokens of this file, and chats are rendered with this template.",
        f"model.generation_config = GenerationConfig.from_pretrained({folder})",
        f"tokenizer = AutoTokenizer.from_pretrained({trained.base!r}{options})",
    ]
    if prompting.chat_template is not None:
        imports |= {"Path": "pathlib"}
        read = f'Path({folder}, {TEMPLATE!r}).read_text(encoding="utf-8")'
        lines.append(f"tokenizer.chat_template = {read}")
    return imports, lines


def _kind(trained: Trained) -> str:
    return TASKS[trained.config.model.task].auto_class.removeprefix("AutoModelFor")


def _labels(trained: Trained) -> str:
    return f", num_labels={len(trained.classes)}" if trained.classes else ""


def _revision(trained: Trained) -> str:
    revision = trained.config.model.revision
    return f", revision={revision!r}" if revision else ""


def _trust(trained: Trained) -> str:
    return ", trust_remote_code=True" if trained.config.model.trust_remote_code else ""


def _added_runs(trained: Trained) -> dict[str, str]:
    if not isinstance(trained, Union):
        return {}
    return {"plus": ", ".join(str(other.path) for other in trained.others)}


def _losses(trained: Trained) -> dict[str, str]:
    """Return a table row with the run's first held-out loss and its last up to the exported step.

    Returns:
        {"held-out loss": "FIRST -> LAST nats per token"}, or "per example" for a classifier; empty
        if the run measured no held-out loss, and for a sum of runs.
    """
    if isinstance(trained, Union):  # the loss of a sum was never measured
        return {}
    path = trained.path.parents[1] / "metrics.jsonl"
    rows = [r for r in read_records(path) if r["step"] <= trained.step] if path.exists() else []
    rows = of_the_same_rows(rows)
    losses = [v for row in rows if isinstance(v := row.get("held_out_loss"), int | float)]
    if not losses:
        return {}
    target = TASKS[trained.config.model.task].target
    return {"held-out loss": f"{losses[0]:.4f} -> {losses[-1]:.4f} nats per {target}"}
