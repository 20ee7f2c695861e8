"""The engine configurations that ship train alike: where shards are kept changes no loss, and the
4-bit bytes that forward and backward use are bitsandbytes' own. NVMe is in ``test_nvme.py``."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from sparse_lora_dist.methods import METHODS
from sparse_lora_dist.run_folder.metrics_file import read_records
from tests.conftest import Ranks
from tests.fixtures.tiny_run import TinyRun
from tests.laws import LAWS
from tests.tiers import in_full
from tests.work.offload import Watched

SHIPPED = Path(__file__).parents[2] / "ds_configs"
WATCHED = "tests.work.offload:train_watched"
USES = {"before", "evaluating", "training", "backward", "after"}


def engine_file(folder: Path, name: str, **zero: Any) -> Path:
    """A shipped file with other ``zero_optimization`` keys."""
    content = json.loads((SHIPPED / f"{name}.json").read_text())
    content["zero_optimization"] |= zero
    file = folder / f"{name}_changed.json"
    file.write_text(json.dumps(content))
    return file


def numbers(folder: Path) -> list[float]:
    """Every loss of a run, of training and held out."""
    rows = read_records(folder / "metrics.jsonl")
    return [row[key] for row in rows for key in ("loss", "held_out_loss") if key in row]


@pytest.mark.parametrize("precision", [in_full("fp32"), "bf16"])
def test_offload_to_host_memory_changes_no_loss_and_no_byte(
    ranks: Ranks, tiny: TinyRun, tmp_path: Path, precision: str
) -> None:
    # Without clipping: the gradient norm is summed in another order there, an ulp's difference.
    options = {"max_steps": 5, "precision": precision, "max_grad_norm": 0, "eval_every": 2}
    for name in ("zero3", "zero3_offload"):
        words = tiny.flags(tmp_path / name, ds_config=SHIPPED / f"{name}.json", **options)
        seen: list[Watched] = ranks(2, WATCHED, flags=words, folder=tiny.model, gather_first=True)
        assert all(watched.compared.keys() == USES for watched in seen)
    offloaded, usual = numbers(tmp_path / "zero3_offload"), numbers(tmp_path / "zero3")
    assert offloaded == usual and usual[-1] < usual[0]


@pytest.mark.parametrize("method", [in_full("adalora"), "roselora"])
def test_a_whole_base_changes_no_loss_and_gathers_nothing_but_adapters(
    ranks: Ranks, tiny: TinyRun, tmp_path: Path, method: str
) -> None:
    """On 2 ranks and on 1, with gradient checkpointing and without; --resume goes on in between."""
    options = LAWS[method].on | {"method": method, "max_steps": 6, "eval_every": 2}
    sharded = engine_file(tmp_path, "zero3", stage3_param_persistence_threshold=0)
    losses = {}
    for name, file, again in (
        ("sharded", sharded, "false"),
        ("whole", SHIPPED / "whole.json", "false"),
        ("whole and checkpointing", SHIPPED / "whole.json", "true"),
        ("sharded and checkpointing", sharded, "true"),
    ):
        words = tiny.flags(tmp_path / name, ds_config=file, gradient_checkpointing=again, **options)
        found = ranks(2, "tests.work.offload:gathered_in_training", flags=words)
        assert all(frozen == 0 for frozen, _ in found) == ("whole" in name), found
        assert all(trained > 0 for _, trained in found)
        losses[name] = numbers(tmp_path / name)
    assert len({tuple(values) for values in losses.values()}) == 1
    half = tiny.flags(tmp_path / "half", ds_config=sharded, **options)
    ranks(2, "tests.work.run:train", flags=[*half, "--stop_after", "3"])
    words = tiny.flags(tmp_path / "half", ds_config=SHIPPED / "whole.json", **options)
    ranks(2, "tests.work.run:train", flags=[*words, "--resume", "auto"])
    trained = [
        [row["loss"] for row in read_records(tmp_path / name / "metrics.jsonl") if "loss" in row]
        for name in ("half", "whole")
    ]
    assert trained[0] == trained[1]


def test_clipping_under_offload_differs_by_rounding(
    ranks: Ranks, tiny: TinyRun, tmp_path: Path
) -> None:
    for name in ("zero3", "zero3_offload"):
        words = tiny.flags(tmp_path / name, ds_config=SHIPPED / f"{name}.json", max_steps=3)
        ranks(2, "tests.work.run:train", flags=words)
    usual, offloaded = (
        read_records(tmp_path / n / "metrics.jsonl")[1:] for n in ("zero3", "zero3_offload")
    )
    for key in ("grad_norm", "loss"):
        assert [r[key] for r in offloaded] == pytest.approx([r[key] for r in usual], rel=1e-6)


@pytest.mark.parametrize(
    "method", [m if m == "adalora" else in_full(m) for m in METHODS if LAWS[m].decides]
)
def test_methods_decide_alike_in_host_memory(
    ranks: Ranks, tiny: TinyRun, tmp_path: Path, method: str
) -> None:
    options = LAWS[method].on | {"method": method, "max_steps": 6, "max_grad_norm": 0}
    for name in ("zero3", "zero3_offload"):
        words = tiny.flags(tmp_path / name, ds_config=SHIPPED / f"{name}.json", **options)
        ranks(2, "tests.work.run:train", flags=words)
    usual, offloaded = tmp_path / "zero3", tmp_path / "zero3_offload"
    assert numbers(offloaded) == numbers(usual)
    decisions = read_records(usual / "decisions.jsonl")
    assert decisions
    assert [_decided(r) for r in read_records(offloaded / "decisions.jsonl")] == [
        _decided(r) for r in decisions
    ]


def _decided(row: dict[str, Any]) -> Any:
    return row["step"], row["ranks"], row["live"]


# hpZ keeps a second copy among the ranks of a node, made from the first gather.
NODES = {
    "two ranks, one node": (2, {}, {}),
    "two nodes": (4, {}, {}),
    "two nodes, bf16": (4, {}, {"precision": "bf16"}),
    # Everything is released at once and comes again for backward; gathers take many buckets.
    "two nodes, nothing stays": (
        4,
        {
            "stage3_param_persistence_threshold": 0,
            "stage3_max_live_parameters": 0,
            "stage3_max_reuse_distance": 0,
            "stage3_prefetch_bucket_size": 1000,
        },
        # The first gather of all is training's.
        {"gradient_checkpointing": True, "eval_data": "null"},
    ),
    "two nodes, in host memory": (
        4,
        {"offload_param": {"device": "cpu", "pin_memory": True}},
        {},
    ),
}


@pytest.mark.parametrize(
    ("size", "zero", "options"),
    [in_full(*row) if "nodes," in name else row for name, row in NODES.items()],
    ids=NODES,
)
def test_a_copy_per_node_changes_no_loss_and_no_byte(
    ranks: Ranks,
    tiny: TinyRun,
    tmp_path: Path,
    size: int,
    zero: dict[str, Any],
    options: dict[str, Any],
) -> None:
    files = {
        "zero3": engine_file(tmp_path, "zero3", **zero),
        "hpz": engine_file(tmp_path, "zero3_hpz", **zero, zero_hpz_partition_size=2),
    }
    seen: dict[str, list[Watched]] = {}
    for name, file in files.items():
        words = tiny.flags(tmp_path / name, **{"max_steps": 5, "ds_config": file} | options)
        seen[name] = ranks(size, WATCHED, flags=words, folder=tiny.model)
    assert numbers(tmp_path / "hpz") == numbers(tmp_path / "zero3")
    uses = USES - {"before"} - ({"evaluating"} if "eval_data" in options else set())
    assert all(w.compared.keys() == uses for everyone in seen.values() for w in everyone)
    if size == 4:
        assert seen["zero3"][0].gathers[2] == 0
        within_node, everyone = (seen["hpz"][0].gathers[n] for n in (2, 4))
        assert within_node > 0.2 * everyone > 0, "later gathers stay inside a node"


def test_a_resumed_run_with_a_copy_per_node_is_the_run_in_one_go(
    ranks: Ranks, tiny: TinyRun, tmp_path: Path
) -> None:
    file = engine_file(tmp_path, "zero3_hpz", zero_hpz_partition_size=2)
    straight, parts = (
        tiny.flags(tmp_path / n, ds_config=file, micro_batch_size=1, max_steps=4, eval_every=2)
        for n in ("straight", "parts")
    )
    for words in (straight, [*parts, "--stop_after", "2"], [*parts, "--resume", "auto"]):
        for watched in ranks(4, WATCHED, flags=words, folder=tiny.model):
            assert watched.compared["training"] and watched.compared["backward"]
    assert numbers(tmp_path / "parts") == numbers(tmp_path / "straight")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("name", ["zero3_offload", "zero3_hpz"])
def test_on_a_gpu_losses_are_those_of_shares_in_its_memory(
    ranks: Ranks, tiny: TinyRun, tmp_path: Path, name: str
) -> None:
    size = torch.cuda.device_count() if name == "zero3_hpz" else 1
    hpz = {"zero_hpz_partition_size": size} if name == "zero3_hpz" else {}
    files = {"zero3": SHIPPED / "zero3.json", name: engine_file(tmp_path, name, **hpz)}
    for run, file in files.items():
        words = tiny.flags(tmp_path / run, ds_config=file, max_steps=5, max_grad_norm=0)
        for watched in ranks(size, WATCHED, flags=words, folder=tiny.model):
            assert watched.compared["training"] and watched.compared["backward"]
    assert numbers(tmp_path / name) == pytest.approx(numbers(tmp_path / "zero3"), abs=1e-5)
