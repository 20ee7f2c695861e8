"""The engine configurations that ship train alike: where shards are kept changes nothing.

``zero3_nvme.json`` is not among them: DeepSpeed would compile its ``async_io`` for minutes, and
needs libaio's headers for it.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from sparse_lora_dist.metrics import read_rows
from tests.conftest import Ranks
from tests.tiny_run import TinyRun

SHIPPED = Path(__file__).parents[1] / "ds_configs"


def _train(ranks: Ranks, size: int, flags: list[str], output_dir: Path) -> tuple[Any, Any]:
    """(training losses and the last held-out loss, group sizes of the gathers of rank 0)."""
    everyone = ranks(size, "tests.engine_work:train_counting_gathers", flags=flags)
    rows = read_rows(output_dir / "metrics.jsonl")
    losses = [row["loss"] for row in rows if "loss" in row]
    assert len(losses) == 5 and losses[-1] < losses[0]
    return [*losses, rows[-1]["held_out_loss"]], everyone[0]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_offload_to_host_memory_changes_no_loss(
    ranks: Ranks, tiny: TinyRun, tmp_path: Path, precision: str
) -> None:
    losses = []
    for name in ("zero3", "zero3_offload"):
        # Without clipping: the gradient norm is summed in another order there, an ulp's difference.
        flags = tiny.flags(
            tmp_path / name,
            max_steps=5,
            ds_config=SHIPPED / f"{name}.json",
            precision=precision,
            max_grad_norm=0,
        )
        losses.append(_train(ranks, 2, flags, tmp_path / name)[0])
    assert losses[0] == losses[1]


@pytest.mark.parametrize(("size", "precision"), [(2, "fp32"), (4, "fp32"), (4, "bf16")])
def test_a_copy_per_node_changes_no_loss(
    ranks: Ranks, tiny: TinyRun, tmp_path: Path, size: int, precision: str
) -> None:
    files = {"zero3": SHIPPED / "zero3.json", "hpz": _node_of_two(tmp_path)}
    runs = {}
    for name, file in files.items():
        flags = tiny.flags(tmp_path / name, max_steps=5, ds_config=file, precision=precision)
        runs[name] = _train(ranks, size, flags, tmp_path / name)
    assert runs["hpz"][0] == runs["zero3"][0]
    if size == 4:
        assert runs["zero3"][1][2] == 0
        within_node, everyone = runs["hpz"][1][2], runs["hpz"][1][4]
        assert within_node > 0.2 * everyone > 0, "backward gathers inside a node"


def _node_of_two(folder: Path) -> Path:
    """zero3_hpz.json for nodes of two ranks."""
    content = json.loads((SHIPPED / "zero3_hpz.json").read_text())
    content["zero_optimization"]["zero_hpz_partition_size"] = 2
    file = folder / "hpz2.json"
    file.write_text(json.dumps(content))
    return file
