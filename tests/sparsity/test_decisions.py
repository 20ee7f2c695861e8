"""Ranks that part are caught at the next decision, with the tensor and the rank named."""

from pathlib import Path

import torch

from sparse_lora_dist.run_folder.metrics_file import read_records
from sparse_lora_dist.sparsity.decisions import digests, sums
from tests.conftest import Ranks
from tests.fixtures.tiny_run import TinyRun
from tests.tiers import grid
from tests.training.test_laws import flags

FIRST = "model.layers.0.self_attn.q_proj.lora_a"


@grid(
    "case threshold",
    [
        ("master", f"At step 6, entries of {FIRST} that are not trained have changed on rank 1"),
        # All ranks gather the same wrong part; only its owner can tell.
        ("live copy", f"At step 6, the gathered copy of {FIRST} that forward uses has other zeros"),
        ("gathered", f"At step 6, {FIRST} differs between rank 0 and rank 1"),
        ("decision", "At step 6, the decision differs between rank 0 and rank 1"),
    ],
    [0, 8192],
    ids=lambda value: value[0] if isinstance(value, tuple) else {0: "sharded"}.get(value, "whole"),
)
def test_a_rank_that_goes_astray_is_named(
    ranks: Ranks, tiny: TinyRun, tmp_path: Path, case: tuple[str, str], threshold: int
) -> None:
    what, said = case
    engine = Path("ds_configs/zero3.json").read_text().replace("8192", str(threshold))
    (tmp_path / "engine.json").write_text(engine)
    options = {"ds_config": tmp_path / "engine.json", "save_every": 5, "max_steps": 30}
    words = flags(tiny, tmp_path / "run", "toy", **options)
    for message in ranks(2, "tests.work.decisions:refusal_after", flags=words, what=what):
        assert said in message and "--resume auto" in message
    # Nothing that was saved is lost, and nothing was saved after.
    checkpoints = sorted(p.name for p in (tmp_path / "run" / "checkpoints").glob("step_*"))
    assert checkpoints == ["step_00000005"]


def test_every_decision_has_a_row_with_each_sites_ranks_and_live_entries(
    ranks: Ranks, tiny: TinyRun, tmp_path: Path
) -> None:
    # With lambda as slow as in the paper, scores change places.
    slow = {"adalora_lambda_lr_factor": 1.0}
    words = flags(tiny, tmp_path, "adalora", adalora_target_rank=3.0, max_steps=30, **slow)
    ranks(2, "tests.work.run:train", flags=words)
    rows = read_records(tmp_path / "decisions.jsonl")
    assert [row["step"] for row in rows] == [4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24]
    assert all(len(row["ranks"]) == len(row["live"]) == 14 for row in rows)
    assert all(sum(row["ranks"].values()) == row["budget"] for row in rows)
    # The budget only falls, yet a linear gains: components come back until the last decision.
    pairs = zip(rows, rows[1:], strict=False)
    assert any(b["ranks"][site] > a["ranks"][site] for a, b in pairs for site in a["ranks"])
    last = read_records(tmp_path / "metrics.jsonl")[-1]
    assert last["budget"] == rows[-1]["budget"] == 3 * 14
    assert last["live_entries"] == sum(rows[-1]["live"].values())
    assert 0 < last["state_bytes"] < last["state_bytes_peak"] <= last["state_bytes_repacking"]
    assert last["statistics_bytes"] == 0 and last["decision_bytes_received"] > 0


def test_a_digest_is_of_every_entry_and_its_place() -> None:
    values = torch.randint(-(2**31), 2**31, (1000,))
    lengths = [0, 300, 1, 699]
    first = digests(values, lengths)
    assert first[0] == 0 and len(set(first.tolist())) == 4
    for place, tensor in ((0, 1), (299, 1), (300, 2), (301, 3), (999, 3)):
        for change in (1, -(2**31), 2**31):
            other = values.clone()
            other[place] += change
            assert (digests(other, lengths) != first).nonzero().flatten().tolist() == [tensor]
    swapped = values.clone()
    swapped[[400, 401]] = values[[401, 400]]
    assert (digests(swapped, lengths) != first).tolist() == [False, False, False, True]


def test_sums_are_of_each_tensor() -> None:
    parts = [torch.arange(5), torch.zeros(0, dtype=torch.int64), torch.full((3,), 2**62)]
    found = sums(torch.cat(parts), [len(part) for part in parts])
    assert found.tolist() == [10, 0, 3 * 2**62 - 2**64]
