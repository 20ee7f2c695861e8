"""Resuming with something begun anew, or under other circumstances: what goes on, what does not."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from sparse_lora_dist.run_folder.metrics_file import read_records
from tests.checkpoint.test_recovery import step
from tests.conftest import Ranks
from tests.fixtures.tiny_run import TinyRun

pytestmark = pytest.mark.usefixtures("processes")

TRAIN, REFUSAL = "tests.work.run:train", "tests.work.run:refusal"
OPTIONS = {"max_steps": 6, "lr_schedule": "linear"}


@pytest.fixture(scope="module")
def four(ranks: Ranks, tiny: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run after 4 of its 6 steps."""
    folder = tmp_path_factory.mktemp("four") / "run"
    ranks(2, TRAIN, flags=tiny.flags(folder, **OPTIONS, stop_after=4))
    return folder


def after_one_step(
    ranks: Ranks, tiny: TinyRun, four: Path, folder: Path, reset: str, first: int
) -> str:
    """Resume at step 4 with something reset, for one step, which is then step ``first``."""
    flags = tiny.flags(folder, **OPTIONS, stop_after=first)
    flags += ["--resume", str(step(four, 4)), "--reset", reset]
    told: str = ranks(2, TRAIN, flags=flags)[0]
    return told


def moments_are_of_one_step(checkpoint: Path) -> bool:
    """m^2 / v is (1 - beta1)^2 / (1 - beta2) = 10 after one step, whatever the gradient was."""
    saved = load_file(checkpoint / "rank_00000.safetensors")
    key = next(k for k in saved if k.startswith("exp_avg/") and k.endswith("up_proj.lora_b"))
    mean, square = saved[key], saved[key.replace("exp_avg", "exp_avg_sq")]
    at = square > 1e-20
    assert at.any()
    return bool(((mean[at] ** 2 / square[at] - 10).abs() < 1e-2).all())


def progress(checkpoint: Path) -> dict[str, int]:
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    return dict(manifest["progress"])


def test_what_is_not_reset_goes_on(ranks: Ranks, tiny: TinyRun, four: Path, tmp_path: Path) -> None:
    begun = [row["learning_rate"] for row in read_records(four / "metrics.jsonl")[1:]]
    at_four = progress(step(four, 4))

    told = after_one_step(ranks, tiny, four, tmp_path / "optimizer", "optimizer", 5)
    assert "step 4; reset: optimizer" in told
    assert moments_are_of_one_step(step(tmp_path / "optimizer", 5))
    assert progress(step(tmp_path / "optimizer", 5))["rows"] == at_four["rows"] * 5 // 4

    after_one_step(ranks, tiny, four, tmp_path / "data", "data", 5)
    assert not moments_are_of_one_step(step(tmp_path / "data", 5))
    assert progress(step(tmp_path / "data", 5))["rows"] == at_four["rows"] // 4

    after_one_step(ranks, tiny, four, tmp_path / "schedule", "schedule", 1)
    row = read_records(tmp_path / "schedule" / "metrics.jsonl")[-1]
    assert row["learning_rate"] == begun[0] and row["step"] == 1
    assert moments_are_of_one_step(step(tmp_path / "schedule", 1))
    assert progress(step(tmp_path / "schedule", 1))["rows"] == at_four["rows"] * 5 // 4
    # Its weights are not the first ones: all three runs of step 5's rows begin with the same loss.
    losses = [
        read_records(tmp_path / n / "metrics.jsonl")[-1]["loss"] for n in ("optimizer", "schedule")
    ]
    assert losses[0] == losses[1]


def test_a_schedule_that_begins_anew_on_a_finished_run_has_data_to_its_end(
    ranks: Ranks, tiny: TinyRun, four: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(four, tmp_path / "run")
    ranks(2, TRAIN, flags=tiny.flags(run, **OPTIONS, resume="auto"))
    flags = tiny.flags(tmp_path / "again", **OPTIONS, resume=step(run, 6), reset="schedule")
    ranks(2, TRAIN, flags=flags)
    rows = read_records(tmp_path / "again" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert all(row["loss"] > 0 for row in rows)
    # What it says to type next is a command that works.
    words = ["--config", str(tmp_path / "again" / "run.yaml"), "--resume", "auto"]
    assert "has made all its 6 steps already" in ranks(2, TRAIN, flags=words)[0]


def test_a_requeued_job_goes_on_from_what_it_saved_since_it_began_elsewhere(
    ranks: Ranks, tiny: TinyRun, four: Path, tmp_path: Path
) -> None:
    flags = tiny.flags(tmp_path, **OPTIONS, resume=step(four, 4), reset="optimizer")
    again = {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1"}
    # Requeued before it saved anything, it begins where it was told to.
    for last, said in ((5, f"{step(four, 4)}, step 4; reset: optimizer"), (6, "step 5")):
        told, _ = ranks(2, TRAIN, flags=[*flags, "--stop_after", str(last)], environment=again)
        assert said in told
    assert "anew" not in told


def test_a_run_that_goes_back_by_name_keeps_the_later_steps_under_another_name(
    ranks: Ranks, tiny: TinyRun, tmp_path: Path
) -> None:
    flags = tiny.flags(tmp_path, max_steps=6, save_every=2)
    ranks(2, TRAIN, flags=flags)
    # Killed while it removed something: cleaned, whatever is resumed.
    shutil.copytree(step(tmp_path, 2), tmp_path / "checkpoints" / ".replaced_step_00000004")
    back = [*flags, "--resume", str(step(tmp_path, 2)), "--stop_after", "4"]
    four = (step(tmp_path, 4) / "rank_00000.safetensors").read_bytes()
    metrics = (tmp_path / "metrics.jsonl").read_bytes()
    told, _ = ranks(2, TRAIN, flags=back)
    found = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert found == ["latest", "set_aside_1", "step_00000002", "step_00000004"]
    kept = tmp_path / "checkpoints" / "set_aside_1"
    assert "step_00000004, step_00000006, later than step 2, with copies" in told
    assert str(kept) in told
    assert (kept / "step_00000004" / "rank_00000.safetensors").read_bytes() == four
    assert (kept / "step_00000006" / "manifest.json").exists()
    assert (kept / "metrics.jsonl").read_bytes() == metrics


@pytest.mark.parametrize(
    ("name", "instead"),
    [
        ("increlora", "Resume that run to its end first"),
        ("cola", "--format merged), and start a new run"),
    ],
)
def test_a_schedule_of_decisions_cannot_begin_anew_in_its_middle(
    ranks: Ranks, tiny: TinyRun, tmp_path: Path, name: str, instead: str
) -> None:
    method = {"method": name, "max_steps": 6}
    ranks(2, TRAIN, flags=tiny.flags(tmp_path / "a", **method, stop_after=2))
    flags = tiny.flags(tmp_path / "b", **method, resume=step(tmp_path / "a", 2), reset="schedule")
    for said in ranks(2, REFUSAL, flags=flags):
        assert f"in the middle of a schedule of {name}" in said and instead in said


def test_a_reset_needs_a_folder_of_its_own(ranks: Ranks, tiny: TinyRun, four: Path) -> None:
    flags = tiny.flags(four, **OPTIONS, resume=step(four, 4), reset="optimizer")
    for said in ranks(2, REFUSAL, flags=flags):
        assert "already holds a run" in said


@pytest.mark.parametrize(
    ("size", "options", "said"),
    [
        (2, {"micro_batch_size": 1}, "--micro_batch_size 1 --gradient_accumulation_steps 2"),
        (1, {"micro_batch_size": 3}, "--micro_batch_size 2 --gradient_accumulation_steps 2"),
        (3, {}, "cannot be divided among 3 ranks. Use 2 or 4 ranks"),
    ],
)
def test_a_global_batch_that_is_not_kept_is_told_how_it_can_be(
    ranks: Ranks, tiny: TinyRun, four: Path, size: int, options: dict[str, int], said: str
) -> None:
    flags = tiny.flags(four, **(OPTIONS | options), resume="auto")
    for told in ranks(size, REFUSAL, flags=flags):
        assert "saved with 4 rows a step" in told and said in told


def test_the_same_base_at_another_path_goes_on_and_is_told(
    ranks: Ranks, tiny: TinyRun, four: Path, tmp_path: Path
) -> None:
    elsewhere = shutil.copytree(tiny.model, tmp_path / "elsewhere")
    run = shutil.copytree(four, tmp_path / "run")
    told, _ = ranks(2, TRAIN, flags=tiny.flags(run, **OPTIONS, model=elsewhere, resume="auto"))
    assert f"model {tiny.model} -> {elsewhere}" in told
    assert read_records(run / "metrics.jsonl")[-1]["step"] == 6


def test_a_resumed_run_is_the_same_run_to_wandb_and_rank_0_alone_writes_it(
    ranks: Ranks, tiny: TinyRun, tmp_path: Path
) -> None:
    # The only test that starts W&B on ranks: W&B reads its environment once a process.
    offline = {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_PROJECT": "our-project"}
    flags = tiny.flags(tmp_path, max_steps=2, trackers="wandb", resume="auto")
    ranks(2, TRAIN, flags=[*flags, "--stop_after", "1"], environment=offline)
    ranks(2, TRAIN, flags=flags, environment=offline)
    logs = sorted((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    assert len(logs) == 2 and len({log.name for log in logs}) == 1, logs
    for log in logs:
        content = log.read_bytes()
        for name in ("held_out_loss", "grad_norm", "live_entries", "our-project"):
            assert name.encode() in content
    assert not (tmp_path / "tensorboard").exists()
