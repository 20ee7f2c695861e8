"""Adapters of several runs as one: their sum, of whatever kind each is."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sparse_lora_dist.errors import UserError
from sparse_lora_dist.export.sum_of_runs import Union
from sparse_lora_dist.export.trained_run import Trained
from tests.conftest import Ranks
from tests.export.test_export_program import exported, whole_weights, with_peft
from tests.fixtures.tiny_run import TinyRun

RUNS: dict[str, dict[str, Any]] = {
    "fa": {"method": "sbora", "rank": 4, "seed": 1},
    "fb": {"method": "sbora", "sbora_side": "fb", "rank": 3, "seed": 2, "alpha": 9},
    "lora": {"method": "lora", "rank": 2, "target_modules": "q_proj,down_proj"},
    "shira": {"method": "shira", "rank": 2},
    "sora": {"method": "sora", "rank": 4, "sora_every": 2, "target_modules": "q_proj"},
}


@pytest.fixture(scope="module")
def runs(ranks: Ranks, tiny: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Name -> its folder, trained when it is first asked for."""
    folder = tmp_path_factory.mktemp("runs")

    def run(name: str) -> Path:
        if not (folder / name).exists():
            flags = tiny.flags(folder / name, **RUNS[name] | {"max_steps": 3})
            ranks(2, "tests.work.run:train", flags=flags)
        return folder / name

    return run


def deltas(folder: Path) -> dict[str, torch.Tensor]:
    """Site -> the whole change, as its run has it."""
    return {site.name: c.rows(0, c.shape[0]) for site, c in Trained.open(folder).changes()}


@pytest.mark.parametrize(
    "names", [("fa", "fb"), ("lora", "fa", "fb"), ("lora", "shira"), ("sora", "fb")]
)
def test_merged_it_is_the_base_and_the_sum(
    runs: Any, tiny: TinyRun, tmp_path: Path, names: tuple[str, ...]
) -> None:
    folders = [runs(name) for name in names]
    flags = ["--format", "merged", "--dtype", "fp32"]
    plus = ",".join(map(str, folders[1:]))
    merged = whole_weights(exported(folders[0], tmp_path / "all", *flags, "--plus", plus))
    alone = whole_weights(exported(folders[0], tmp_path / "one", *flags))
    wanted = dict(alone)
    for folder in folders[1:]:
        for site, change_OI in deltas(folder).items():
            wanted[f"{site}.weight"] = wanted[f"{site}.weight"] + change_OI
    assert merged.keys() == wanted.keys()
    for key, weight in merged.items():
        torch.testing.assert_close(weight, wanted[key], rtol=0, atol=1e-6)
    assert str(folders[1]) in (tmp_path / "all" / "README.md").read_text()


def test_peft_opens_pairs_side_by_side(runs: Any, tiny: TinyRun, tmp_path: Path) -> None:
    plus = f"{runs('fa')}, {runs('fb')}"
    adapter = exported(runs("lora"), tmp_path / "sum", "--plus", plus)
    sizes = {k: len(t) for k, t in load_file(adapter / "adapter_model.safetensors").items()}
    ranks_of = {
        k.split(".lora_A")[0].rpartition(".")[2]: n for k, n in sizes.items() if "lora_A" in k
    }
    assert ranks_of["q_proj"] == 2 + 4 + 3 and ranks_of["v_proj"] == 4 + 3
    flags = ["--format", "merged", "--dtype", "fp32", "--plus", plus]
    exported(runs("lora"), tmp_path / "merged", *flags)
    from transformers import AutoModelForCausalLM

    from tests.export.test_export_program import logits_of

    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    assert with_peft(tiny, adapter).numpy() == pytest.approx(logits_of(merged).numpy(), abs=1e-4)


def test_a_scale_in_b_is_not_rounded_once_more(ranks: Ranks, tiny: TinyRun, tmp_path: Path) -> None:
    """In bf16, and where the scales are no powers of two apart."""
    for name, alpha in (("one", 16), ("other", 9)):
        options = {"alpha": alpha, "precision": "bf16", "max_steps": 2}
        ranks(1, "tests.work.run:train", flags=tiny.flags(tmp_path / name, **options))
    exported(tmp_path / "one", tmp_path / "sum", "--plus", str(tmp_path / "other"))
    tensors = load_file(tmp_path / "sum" / "adapter_model.safetensors")
    alone = load_file(tmp_path / "other" / "adapter" / "adapter_model.safetensors")
    for key, b_OR in alone.items():
        if "lora_B" in key:
            assert b_OR.dtype == torch.bfloat16
            assert torch.equal(tensors[key][:, -b_OR.shape[1] :], b_OR.float() * (9 / 16))


def test_supports_of_sbora_meet_where_rows_and_columns_cross(runs: Any) -> None:
    """What the union of a few columns and a few rows changes, and no more."""
    union = Union.of(Trained.open(runs("fa")), [str(runs("fb"))])
    columns, rows = deltas(runs("fa")), deltas(runs("fb"))
    for site, change in union.changes():
        change_OI = change.rows(0, change.shape[0])
        touched = (columns[site.name] != 0) | (rows[site.name] != 0)
        assert not change_OI[~touched].any()
        some, others = (columns[site.name] != 0).any(0).sum(), (rows[site.name] != 0).any(1).sum()
        assert (int(some), int(others)) == (4, 3)
        assert (
            int((change_OI != 0).sum())
            <= change.max_changed
            <= 4 * site.out_features + 3 * site.in_features
        )


def test_what_cannot_be_added_is_refused(
    runs: Any, ranks: Ranks, tiny: TinyRun, tmp_path: Path
) -> None:
    for name, options in (
        ("neat", {"method": "neat"}),
        ("full", {"modules_to_save": "lm_head", "rank": 2}),
    ):
        flags = tiny.flags(tmp_path / name, max_steps=1, **options)
        ranks(1, "tests.work.run:train", flags=flags)
    with pytest.raises(UserError, match="--method neat, because their update depends on"):
        exported(runs("fa"), tmp_path / "out", "--plus", str(tmp_path / "neat"))
    with pytest.raises(UserError, match="trained lm_head in full.*Name it first"):
        exported(runs("fa"), tmp_path / "out", "--plus", str(tmp_path / "full"))
    with pytest.raises(UserError, match="is not a folder"):
        exported(runs("fa"), tmp_path / "out", "--plus", str(tmp_path / "nowhere"))
    assert not (tmp_path / "out").exists()
