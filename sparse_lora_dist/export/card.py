"""Writes the model card (README.md) of an export: its origin, figures, and code to load it."""

from collections.abc import Mapping
from pathlib import Path

from sparse_lora_dist.export.sum_of_runs import Union
from sparse_lora_dist.export.trained_run import Trained
from sparse_lora_dist.run_folder.metrics_file import read_records
from sparse_lora_dist.tasks import TASKS
from sparse_lora_dist.version import __version__

CARD, SIGNATURE = "README.md", "launcher/export.py."
LOADING_CODE = {
    "peft": """\
from peft import AutoPeftModelFor{kind}
model = AutoPeftModelFor{kind}.from_pretrained("{folder}"{options})""",
    "merged": """\
from transformers import AutoModelFor{kind}
model = AutoModelFor{kind}.from_pretrained("{folder}", dtype="auto"{code})""",
    "sparse_delta": """\
from pathlib import Path
from transformers import AutoModelFor{kind}
from sparse_lora_dist import apply_sparse_delta
model = AutoModelFor{kind}.from_pretrained("{base}", dtype="auto"{options}){note}
applied = apply_sparse_delta(model, Path("{folder}"))
applied.undo()  # restores every weight bit for bit""",
}
"""Value of ``--format`` -> template of the Python code that loads the export.

``write_card`` fills the placeholder {folder}; ``_code_fields`` returns the values of all other
placeholders.
"""


def write_card(
    trained: Trained, folder: Path, final: Path, kind: str, summary: Mapping[str, str]
) -> None:
    """Write README.md with the origin of an export, a table about it, and code that loads it.

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
    lines = [f"| {name} | {value} |" for name, value in about.items()]
    library = "peft" if kind == "peft" else "transformers"
    fields = _code_fields(trained) | {"folder": str(final)}
    text = "\n".join(
        [
            "---",
            f"base_model: {trained.base}",
            f"library_name: {library}",
            f"tags: [sparse-lora-dist, {'lora' if trained.is_lora else config.adapter.method}]",
            "---",
            "",
            f"# {Path(trained.base).name}, fine-tuned with {config.adapter.method}",
            "",
            "| | |",
            "|---|---|",
            *lines,
            "",
            "```python",
            LOADING_CODE[kind].format(**fields),
            "```",
            "",
            f"Written by sparse_lora_dist {__version__}, {SIGNATURE}",
            "",
        ]
    )
    (folder / CARD).write_text(text)


def _code_fields(trained: Trained) -> dict[str, str]:
    """Return placeholder -> value for the templates in ``LOADING_CODE``, except for {folder}."""
    model = trained.config.model
    code = ", trust_remote_code=True" if model.trust_remote_code else ""
    labels = f", num_labels={len(trained.classes)}" if trained.classes else ""
    revision = f', revision="{model.revision}"' if model.revision else ""
    in_full = ", ".join(trained.manifest["full_modules"])
    return {
        "kind": TASKS[model.task].auto_class.removeprefix("AutoModelFor"),
        "base": trained.base,
        "code": code,
        "options": f"{labels}{revision}{code}",
        "note": f"  # without the trained weights of {in_full}" if in_full else "",
    }


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
    losses = [v for row in rows if isinstance(v := row.get("held_out_loss"), int | float)]
    if not losses:
        return {}
    target = TASKS[trained.config.model.task].target
    return {"held-out loss": f"{losses[0]:.4f} -> {losses[-1]:.4f} nats per {target}"}
