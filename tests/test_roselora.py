"""RoseLoRA: golden numbers of the paper, and real sharded runs that prune as it says."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from sparse_lora_dist.methods.roselora import (
    RoseLoraOptions,
    keep_within_pieces,
    roselora,
    smooth_sensitivity,
)
from sparse_lora_dist.metrics import read_rows
from sparse_lora_dist.schedule import cubic_keep
from tests.conftest import Ranks
from tests.test_methods import saved
from tests.tiny_run import TinyRun
from tests.whole_score import WholeScore

STEPS, KEEP, RANK = 12, 0.1, 4


@pytest.mark.parametrize(
    ("step", "keep"),
    [(1, 1.0), (3, 1.0), (4, 0.842021), (10, 0.243365), (15, 0.074171), (19, 0.050193), (20, 0.05)],
)
def test_the_keep_schedule_is_the_papers(step: int, keep: float) -> None:
    assert cubic_keep(step, begin=3, end=20, final=0.05) == pytest.approx(keep, abs=5e-7)


def test_the_average_starts_at_zero_and_tends_to_a_constant_sensitivity() -> None:
    w, grad, smoothed = torch.full((3,), -2.0), torch.full((3,), 0.5), torch.zeros(3)
    for step in range(1, 6):
        smoothed = smooth_sensitivity(smoothed, w, grad, beta=0.8)
        torch.testing.assert_close(smoothed, torch.full((3,), 1 - 0.8**step))


def pieces(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"q.lora_a": (8, 768), "q.lora_b": (768, 8)}
    return {name: torch.rand(shape, generator=generator) for name, shape in shapes.items()}


def test_each_row_of_a_and_column_of_b_keeps_its_top_share() -> None:
    scores = pieces()
    masks = keep_within_pieces({n: WholeScore(s) for n, s in scores.items()}, 0.05)
    a_RI, b_OR = (masks[n].view(scores[n].shape) for n in scores)
    assert (a_RI.sum(1) == 38).all() and (b_OR.sum(0) == 38).all()  # floor(.05 * 768)
    for row, mask in zip(scores["q.lora_a"], a_RI, strict=True):
        assert row[mask].min() > row[~mask].max()


def test_a_share_that_is_a_whole_number_is_kept_whole() -> None:
    """0.29 * 100 is 28.999999999999996 in floating point."""
    masks = keep_within_pieces({"q.lora_a": WholeScore(torch.rand(2, 100))}, 0.29)
    assert (masks["q.lora_a"].view(2, 100).sum(1) == 29).all()


def test_a_piece_never_dies_whole() -> None:
    masks = keep_within_pieces({"q.lora_a": WholeScore(torch.rand(3, 10))}, 0.01)
    assert (masks["q.lora_a"].view(3, 10).sum(1) == 1).all()


def test_the_product_is_as_sparse_as_proposition_1_promises() -> None:
    scores = pieces()
    masks = keep_within_pieces({n: WholeScore(s) for n, s in scores.items()}, 0.05)
    a_RI, b_OR = (masks[n].view(s.shape).float() for n, s in scores.items())
    zeros = float((b_OR @ a_RI == 0).float().mean())
    assert zeros >= 1 - 8 * 0.05**2
    # Random independent supports: (1 - tau^2)^R.
    assert zeros == pytest.approx((1 - (38 / 768) ** 2) ** 8, abs=2e-3)


def test_bad_options_are_told_together() -> None:
    with pytest.raises(ValueError) as error:
        RoseLoraOptions(roselora_keep=0.0, roselora_begin=0.9, roselora_end=0.8, roselora_beta=1.0)
    for word in ("roselora_keep must be in (0, 1]", "begin < end", "roselora_beta must be"):
        assert word in str(error.value)


def test_masks_are_held_between_decisions_and_the_end_is_always_decided() -> None:
    method = roselora(RoseLoraOptions(roselora_every=5, roselora_begin=0.1, roselora_end=0.8), 23)
    assert [s for s in range(1, 24) if method.decides_at(s)] == [5, 10, 15, 18, 23]


def test_nothing_is_decided_while_every_importance_is_zero() -> None:
    """B is zero at step 1; a decision there would prune by index."""
    for options in (RoseLoraOptions(), RoseLoraOptions(roselora_begin=0.0)):
        method = roselora(options, 4)
        assert min(s for s in range(1, 5) if method.decides_at(s)) == 2


def test_a_run_too_short_to_prune_in_is_refused() -> None:
    for begin, steps in ((0.1, 1), (0.95, 10)):
        with pytest.raises(ValueError, match=f"the run has {steps}"):
            roselora(RoseLoraOptions(roselora_begin=begin, roselora_end=1.0), steps)


# --- on real ranks --------------------------------------------------------------------------------


def flags(tiny: TinyRun, folder: Path, **options: object) -> list[str]:
    usual = {"method": "roselora", "roselora_keep": KEEP, "max_steps": STEPS, "save_every": 6}
    return tiny.flags(folder, **usual | {"micro_batch_size": 3, "rank": RANK} | options)


@pytest.fixture(scope="module")
def two_ranks(ranks: Ranks, tiny: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("roselora")
    ranks(2, "tests.run_work:train", flags=flags(tiny, folder))
    return folder


def test_the_exported_adapter_has_the_counts_of_the_schedule(two_ranks: Path) -> None:
    weights = load_file(two_ranks / "adapter" / "adapter_model.safetensors")
    for name, w in weights.items():
        within = 1 if "lora_A" in name else 0
        kept = max(1, int(KEEP * w.shape[within]))
        assert ((w != 0).sum(within) == kept).all(), name
    live = [row["live_entries"] for row in read_rows(two_ranks / "metrics.jsonl")[1:]]
    assert live[-1] == sum(int((w != 0).sum()) for w in weights.values()) < live[0] / 8
    assert live == sorted(live, reverse=True)


def test_what_is_dead_is_zero_in_master_and_live_copy_under_bf16(
    ranks: Ranks, tiny: TinyRun, tmp_path: Path
) -> None:
    """Where PEFT's AdaLoRA leaves nothing masked after the next step."""
    ranks(2, "tests.run_work:train", flags=flags(tiny, tmp_path, precision="bf16"))
    master, live = saved(tmp_path, "master", STEPS), saved(tmp_path, "live", STEPS)
    weights = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    for name, mask in live.items():
        assert (master[name][~mask] == 0).all() and not mask.all()
        theirs = name.replace("lora_a", "lora_A.weight").replace("lora_b", "lora_B.weight")
        assert (weights[f"base_model.model.{theirs}"].flatten()[~mask] == 0).all()


@pytest.mark.parametrize("world", [1, 3])
def test_any_number_of_ranks_gives_the_same_masks_and_parameters(
    ranks: Ranks, tiny: TinyRun, two_ranks: Path, tmp_path: Path, world: int
) -> None:
    options = {"micro_batch_size": 6 // world}
    ranks(world, "tests.run_work:train", flags=flags(tiny, tmp_path, **options))
    masks, others = saved(two_ranks, "live", STEPS), saved(tmp_path, "live", STEPS)
    assert all(torch.equal(masks[name], others[name]) for name in masks)
    masters, others = saved(two_ranks, "master", STEPS), saved(tmp_path, "master", STEPS)
    for name, w in masters.items():
        torch.testing.assert_close(others[name], w, rtol=0, atol=1e-5)


def test_stopping_between_decisions_and_resuming_changes_no_bit(
    ranks: Ranks, tiny: TinyRun, two_ranks: Path, tmp_path: Path
) -> None:
    for options in ({"stop_after": 6}, {"resume": "auto"}):
        ranks(2, "tests.run_work:train", flags=flags(tiny, tmp_path, **options))
    for key in ("master", "live", "exp_avg", "exp_avg_sq", "stat0"):
        straight, resumed = saved(two_ranks, key, STEPS), saved(tmp_path, key, STEPS)
        assert all(torch.equal(straight[name], resumed[name]) for name in straight), key


def test_keeping_everything_is_plain_lora_step_for_step(
    ranks: Ranks, tiny: TinyRun, tmp_path: Path
) -> None:
    losses = []
    for name, options in (("rose", {"roselora_keep": 1.0}), ("lora", {"method": "lora"})):
        words = flags(tiny, tmp_path / name, **options)
        if name == "lora":
            at = words.index("--roselora_keep")
            del words[at : at + 2]
        ranks(2, "tests.run_work:train", flags=words)
        losses.append([r["loss"] for r in read_rows(tmp_path / name / "metrics.jsonl")[1:]])
    assert losses[0] == losses[1]


def test_offload_and_infinite_scores(ranks: Ranks, tiny: TinyRun, tmp_path: Path) -> None:
    engine = {"ds_config": "ds_configs/zero3_offload.json", "max_grad_norm": 0}
    losses = []
    for name, options in (("host", engine), ("device", {"max_grad_norm": 0})):
        ranks(2, "tests.run_work:train", flags=flags(tiny, tmp_path / name, **options))
        losses.append([r["loss"] for r in read_rows(tmp_path / name / "metrics.jsonl")[1:]])
    assert losses[0] == losses[1]
    wild = flags(tiny, tmp_path / "wild", learning_rate=1e30)
    for said in ranks(2, "tests.run_work:refusal", flags=wild):
        assert "importance scores hold NaN or infinity" in said and "--learning_rate" in said
