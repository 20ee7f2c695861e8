"""Steps whose loss or gradient is not finite, and losses out of the ordinary."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sparse_lora_dist.data import Batch
from sparse_lora_dist.errors import UserError
from sparse_lora_dist.methods.shared.bit_masks import unpack_bits
from sparse_lora_dist.run_folder.metrics_file import read_records
from sparse_lora_dist.training.bad_steps import ENOUGH, Health
from sparse_lora_dist.training.step import StepResult
from tests.config.test_ds_configs import engine_file
from tests.conftest import Ranks
from tests.fixtures.tiny_run import TinyRun
from tests.tiers import in_full

pytestmark = pytest.mark.usefixtures("processes")

SPOILT, REFUSAL = "tests.work.health:train_spoilt", "tests.work.health:refusal_spoilt"
# RoseLoRA keeps statistics at every step, and decides at 2, 4 and 6.
OPTIONS = {"max_steps": 8, "method": "roselora", "roselora_every": 2, "save_every": 1}


def saved(run: Path, step: int) -> dict[str, torch.Tensor]:
    files = sorted((run / "checkpoints" / f"step_{step:08d}").glob("*.safetensors"))
    return {f"{i} {k}": t for i, f in enumerate(files) for k, t in load_file(f).items()}


def differ(run: Path, one: int, other: int) -> set[str]:
    """Kinds of tensors that changed between two steps."""
    before, after = saved(run, one), saved(run, other)
    return {
        name.split()[1].partition("/")[0]
        for name in before
        if before[name].shape != after[name].shape or not before[name].equal(after[name])
    }


@pytest.mark.parametrize(
    ("what", "engine"),
    [("loss", "zero3"), in_full("gradient", "zero3"), ("gradient", "zero3_offload")],
)
def test_a_bad_step_changes_nothing_on_any_rank(
    ranks: Ranks, tiny: TinyRun, tmp_path: Path, what: str, engine: str
) -> None:
    path = engine_file(tmp_path, engine, stage3_param_persistence_threshold=0)
    flags = tiny.flags(tmp_path / "run", **OPTIONS, ds_config=path)
    told, _ = ranks(2, SPOILT, flags=flags, what=what, steps=[3])
    (line,) = [line for line in told.splitlines() if line.startswith("bad step")]
    assert "3 had " in line and "left out, 1 in a row" in line
    run = tmp_path / "run"
    assert differ(run, 2, 3) == set()
    assert {"master", "exp_avg", "stat0"} <= differ(run, 3, 4)
    (row,) = read_records(run / "bad_steps.jsonl")
    assert (row["step"], row["kind"], len(row["rows"])) == (3, "left out", 4)
    assert all(t.isfinite().all() for t in saved(run, 8).values())


@pytest.mark.usefixtures("full")
def test_a_decision_of_a_bad_step_holds_and_a_resume_is_uninterrupted(
    ranks: Ranks, tiny: TinyRun, tmp_path: Path
) -> None:
    whole, cut = (tiny.flags(tmp_path / n, **OPTIONS) for n in ("whole", "cut"))
    ranks(2, SPOILT, flags=whole, what="gradient", steps=[4])
    ranks(2, SPOILT, flags=[*cut, "--stop_after", "4"], what="gradient", steps=[4])
    ranks(2, "tests.work.run:train", flags=[*cut, "--resume", "auto"])
    one, other = (tmp_path / n / "adapter" / "adapter_model.safetensors" for n in ("whole", "cut"))
    assert one.read_bytes() == other.read_bytes()
    after = saved(tmp_path / "whole", 4)
    dead = 0
    for name, live in after.items():
        if " live/" in name:
            master = after[name.replace("live/", "master/")]
            live = unpack_bits(live, len(master))
            assert (master[~live] == 0).all()
            dead += int((~live).sum())
    assert dead > 0 and "live" in differ(tmp_path / "whole", 3, 4)


def test_probes_of_a_bad_step_are_forgotten(ranks: Ranks, tiny: TinyRun, tmp_path: Path) -> None:
    options = {"max_steps": 8, "method": "increlora", "increlora_score": "delta"}
    flags = tiny.flags(tmp_path, **options, increlora_every=2, gradient_accumulation_steps=2)
    ranks(2, SPOILT, flags=flags, what="loss", steps=[3])
    assert len(read_records(tmp_path / "decisions.jsonl")) > 1
    rows = read_records(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows if row.get("loss", 0) is None] == [3]


def test_too_many_in_a_row_end_the_run(ranks: Ranks, tiny: TinyRun, tmp_path: Path) -> None:
    options: dict[str, Any] = OPTIONS | {"max_bad_steps": 3}
    flags = tiny.flags(tmp_path, **options)
    for said in ranks(2, REFUSAL, flags=flags, what="loss", steps=[2, 3, 5, 6, 7]):
        assert "3 steps in a row" in said and "bad_steps.jsonl" in said and "--resume auto" in said
    assert [row["step"] for row in read_records(tmp_path / "bad_steps.jsonl")] == [2, 3, 5, 6, 7]
    assert sorted(p.name for p in (tmp_path / "checkpoints").glob("step_*"))[-1] == "step_00000006"
    assert not list((tmp_path / "checkpoints").glob(".tmp_*"))


def result(loss: float) -> StepResult:
    return StepResult(loss=loss, applied=loss == loss, tokens=1, decision=None)


def test_a_spike_is_told_with_its_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    health = Health(tmp_path, 2, last_step=None)
    none = torch.zeros(2, 1, dtype=torch.long)
    batch = Batch(
        input_ids_MT=none, labels_MT=none, position_ids_MT=none, rows_M=(7, -1), lengths_M=(1, 0)
    )
    for step in range(1, ENOUGH + 1):
        health.after_step(step, result(2.0 + 0.1 * (step % 2)), [batch])
    health.after_step(ENOUGH + 1, result(2.2), [batch])
    assert not (tmp_path / "bad_steps.jsonl").exists()
    health.after_step(ENOUGH + 2, result(9.0), [batch])
    assert "spike     loss 9.0000 at step 22" in capsys.readouterr().out
    (row,) = read_records(tmp_path / "bad_steps.jsonl")
    assert row == {"step": ENOUGH + 2, "kind": "spike", "loss": 9.0, "rows": [7]}
    health.after_step(ENOUGH + 3, result(float("nan")), [batch])
    with pytest.raises(UserError, match="2 steps in a row"):
        health.after_step(ENOUGH + 4, result(float("nan")), [batch])
