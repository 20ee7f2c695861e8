"""That a run which was stopped or killed came to the end of one which was not."""

from pathlib import Path

from sparse_lora_dist.run_folder.metrics_log import read_rows

TOLD = (
    *("step", "loss", "held_out_loss", "grad_norm", "tokens"),
    *("live_entries", "live", "ranks", "budget"),
)
"""Of the rows of metrics and decisions; the rest is time, memory and what one program received."""


def check_same(run: Path, undisturbed: Path) -> None:
    """Bit for bit the same parameters, and the same losses and decisions."""
    one, other = (r / "adapter" / "adapter_model.safetensors" for r in (run, undisturbed))
    assert one.read_bytes() == other.read_bytes()
    for name in ("metrics.jsonl", "decisions.jsonl"):
        rows = [read_rows(r / name) for r in (run, undisturbed)]
        told = [[{k: v for k, v in row.items() if k in TOLD} for row in rs] for rs in rows]
        assert told[0] == told[1], name
