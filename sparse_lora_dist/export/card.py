"""README.md beside an export: what it is, where it comes from, how to load it."""

from collections.abc import Mapping
from pathlib import Path

from sparse_lora_dist import __version__
from sparse_lora_dist.export.trained import Trained
from sparse_lora_dist.metrics import read_rows
from sparse_lora_dist.tasks import TASKS

LOADING = {
    "peft": """\
from peft import AutoPeftModelFor{peft_class}
model = AutoPeftModelFor{peft_class}.from_pretrained("{folder}")""",
    "merged": """\
from transformers import AutoModelFor{auto_class}
model = AutoModelFor{auto_class}.from_pretrained("{folder}", dtype="auto")""",
    "sparse_delta": """\
from pathlib import Path
from transformers import AutoModelFor{auto_class}
from sparse_lora_dist.export.sparse_delta import apply_sparse_delta
model = AutoModelFor{auto_class}.from_pretrained("{base}", dtype="auto")
applied = apply_sparse_delta(model, Path("{folder}"))
applied.undo()  # every weight as it was, bit for bit""",
}
CLASSES = {
    "causal_lm": {"auto_class": "CausalLM", "peft_class": "CausalLM"},
    "seq_cls": {"auto_class": "SequenceClassification", "peft_class": "SequenceClassification"},
}


def write_card(
    trained: Trained, folder: Path, final: Path, kind: str, facts: Mapping[str, str]
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
        **facts,
    }
    lines = [f"| {name} | {value} |" for name, value in about.items()]
    library = "peft" if kind == "peft" else "transformers"
    names = CLASSES[config.model.task] | {"folder": str(final), "base": trained.base}
    text = "\n".join(
        [
            "---",
            f"base_model: {trained.base}",
            f"library_name: {library}",
            "tags: [sparse-lora-dist, lora]",
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
            f"Written by sparse_lora_dist {__version__}, launcher/export.py.",
            "",
        ]
    )
    (folder / "README.md").write_text(text)


def _losses(trained: Trained) -> dict[str, str]:
    """Held-out losses, first and at this step."""
    path = trained.path.parents[1] / "metrics.jsonl"
    rows = [r for r in read_rows(path) if r["step"] <= trained.step] if path.exists() else []
    losses = [row["held_out_loss"] for row in rows if row.get("held_out_loss") is not None]
    if not losses:
        return {}
    target = TASKS[trained.config.model.task].target
    return {"held-out loss": f"{losses[0]:.4f} -> {losses[-1]:.4f} nats per {target}"}
