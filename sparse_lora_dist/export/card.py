"""README.md beside an export: what it is, where it comes from, how to load it."""

from collections.abc import Mapping
from pathlib import Path

from sparse_lora_dist.export.sum_of_runs import Union
from sparse_lora_dist.export.trained_run import Trained
from sparse_lora_dist.run_folder.metrics_file import read_records
from sparse_lora_dist.tasks import TASKS
from sparse_lora_dist.version import __version__

CARD, SIGNATURE = "README.md", "launcher/export.py."
LOADING = {
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
applied.undo()  # every weight as it was, bit for bit""",
}
KINDS = {"causal_lm": "CausalLM", "seq_cls": "SequenceClassification"}


def write_card(
    trained: Trained, folder: Path, final: Path, kind: str, summary: Mapping[str, str]
) -> None:
    """Facts of the run, then those of this export, then the commands to load it from ``final``."""
    config = trained.config
    about = {
        "base model": trained.base,
        "method": config.adapter.method,
        "trained on": config.data.data,
        "steps": f"{trained.step:,} of {trained.manifest['total_steps']:,}",
        "tokens": f"{trained.manifest['progress']['tokens']:,}",
        **_losses(trained),
        **_others(trained),
        **summary,
    }
    lines = [f"| {name} | {value} |" for name, value in about.items()]
    library = "peft" if kind == "peft" else "transformers"
    names = _names(trained) | {"folder": str(final)}
    text = "\n".join(
        [
            "---",
            f"base_model: {trained.base}",
            f"library_name: {library}",
            f"tags: [sparse-lora-dist, {'lora' if trained.is_lora else config.adapter.method}]",
            "---",
            "",
            f"# {config.adapter.method} over {Path(trained.base).name}",
            "",
            "| | |",
            "|---|---|",
            *lines,
            "",
            "```python",
            LOADING[kind].format(**names),
            "```",
            "",
            f"Written by sparse_lora_dist {__version__}, {SIGNATURE}",
            "",
        ]
    )
    (folder / CARD).write_text(text)


def _names(trained: Trained) -> dict[str, str]:
    """What the lines that load it need to know."""
    model = trained.config.model
    code = ", trust_remote_code=True" if model.trust_remote_code else ""
    labels = f", num_labels={len(trained.classes)}" if trained.classes else ""
    revision = f', revision="{model.revision}"' if model.revision else ""
    apart = ", ".join(trained.manifest["full_modules"])
    return {
        "kind": KINDS[model.task],
        "base": trained.base,
        "code": code,
        "options": f"{labels}{revision}{code}",
        "note": f"  # without what was trained of {apart}" if apart else "",
    }


def _others(trained: Trained) -> dict[str, str]:
    """What was added to it."""
    if not isinstance(trained, Union):
        return {}
    return {"plus": ", ".join(str(other.path) for other in trained.others)}


def _losses(trained: Trained) -> dict[str, str]:
    """Held-out losses, first and at this step."""
    if isinstance(trained, Union):  # nobody has measured a sum
        return {}
    path = trained.path.parents[1] / "metrics.jsonl"
    rows = [r for r in read_records(path) if r["step"] <= trained.step] if path.exists() else []
    losses = [row["held_out_loss"] for row in rows if row.get("held_out_loss") is not None]
    if not losses:
        return {}
    target = TASKS[trained.config.model.task].target
    return {"held-out loss": f"{losses[0]:.4f} -> {losses[-1]:.4f} nats per {target}"}
