"""Checkpoints that a crash, a disk or a hand has damaged, and what a killed job leaves behind."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import pytest

from sparse_lora_dist import checkpoint
from sparse_lora_dist.checkpoint.manifest import FORMAT, sealed
from sparse_lora_dist.checkpoint.recover import newest_whole
from sparse_lora_dist.errors import UserError
from sparse_lora_dist.run_folder.metrics_file import read_records
from tests.conftest import Ranks
from tests.fixtures.tiny_run import TinyRun
from tests.tiers import in_full

pytestmark = pytest.mark.usefixtures("processes")

TRAIN, REFUSAL = "tests.work.run:train", "tests.work.run:refusal"
VERIFY = "tests.work.run:verified"


@pytest.fixture(scope="module")
def whole(ranks: Ranks, tiny: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps, saved at 2, 4 and 6."""
    folder = tmp_path_factory.mktemp("recovery") / "run"
    ranks(2, TRAIN, flags=tiny.flags(folder, max_steps=6, save_every=2))
    return folder


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    """A copy, of which step 6 is to be damaged."""
    return shutil.copytree(whole, tmp_path / "run")


def step(run: Path, number: int) -> Path:
    return run / "checkpoints" / f"step_{number:08d}"


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)


def change_a_number(file: Path) -> None:
    manifest = json.loads(file.read_text())
    manifest["progress"]["rows"] += 1
    file.write_text(json.dumps(manifest, indent=1))


DAMAGES: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "gone": ("rank_00001.safetensors", Path.unlink, "is missing"),
    "cut": ("rank_00000.safetensors", lambda f: f.write_bytes(f.read_bytes()[:-9]), "has "),
    "a bit": ("rank_00001.safetensors", flip_a_bit, "was altered after it was saved"),
    "manifest cut": ("manifest.json", lambda f: f.write_text(f.read_text()[:-9]), "is damaged"),
    "manifest empty": ("manifest.json", lambda f: f.write_text(""), "is damaged"),
    "manifest a list": ("manifest.json", lambda f: f.write_text("[]"), "is damaged"),
    "a number": ("manifest.json", change_a_number, "was altered after it was saved"),
}


@pytest.mark.parametrize("damage", [in_full(d) if "manifest" in d else d for d in DAMAGES])
def test_a_damaged_checkpoint_is_skipped_and_named(
    ranks: Ranks, tiny: TinyRun, whole: Path, run: Path, damage: str
) -> None:
    name, harm, said = DAMAGES[damage]
    harm(step(run, 6) / name)
    flags = tiny.flags(run, max_steps=6, save_every=2, resume="auto")
    told, _ = ranks(2, TRAIN, flags=flags)
    (skipped,) = [line for line in told.splitlines() if line.startswith("skipped")]
    assert str(step(run, 6) / name) in skipped and said in skipped
    assert f"{step(run, 4)}, step 4" in told
    losses = [[row.get("loss") for row in read_records(r / "metrics.jsonl")] for r in (whole, run)]
    assert losses[0] == losses[1]
    one, other = (step(r, 6) / "rank_00001.safetensors" for r in (whole, run))
    assert one.read_bytes() == other.read_bytes()


def test_with_nothing_whole_left_a_person_decides(ranks: Ranks, tiny: TinyRun, run: Path) -> None:
    for number in (2, 4, 6):
        flip_a_bit(step(run, number) / "rank_00000.safetensors")
    before = sorted(run.rglob("*"))
    for said in ranks(2, REFUSAL, flags=tiny.flags(run, max_steps=6, resume="auto")):
        assert f"None of the checkpoints in {run}/checkpoints is intact" in said
    assert sorted(run.rglob("*")) == before


def test_what_a_killed_job_left_is_cleaned_and_nothing_that_was_published_is_lost(
    ranks: Ranks, tiny: TinyRun, run: Path
) -> None:
    folder = run / "checkpoints"
    torn = folder / ".tmp_step_00000008"
    torn.mkdir()
    (torn / "rank_00000.safetensors").write_bytes(b"half of")
    (folder / ".tmp_latest").write_text("step_")
    # Killed between the two renames that replace a step: the old one has no name yet.
    step(run, 6).rename(folder / ".replaced_step_00000006")
    # Killed after them: the old one is still there.
    shutil.copytree(step(run, 4), folder / ".replaced_step_00000004")
    # Somebody's own copy is no checkpoint of this run's, and stays.
    shutil.copytree(step(run, 4), folder / "step_00000008_backup")
    told, _ = ranks(2, TRAIN, flags=tiny.flags(run, max_steps=6, resume="auto"))
    assert "has made all its 6 steps already" in told
    assert sorted(p.name for p in folder.iterdir()) == [
        "latest",
        "step_00000002",
        "step_00000004",
        "step_00000006",
        "step_00000008_backup",
    ]


def test_verify_reads_all_and_changes_nothing(ranks: Ranks, run: Path, tmp_path: Path) -> None:
    told, other = ranks(2, VERIFY, run=run)
    assert [line.split() for line in told.splitlines()] == [
        ["intact", str(step(run, number))] for number in (2, 4, 6)
    ]
    assert other == ""
    flip_a_bit(step(run, 4) / "rank_00001.safetensors")
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    told, _ = ranks(2, VERIFY, run=run)
    lines = told.splitlines()
    assert lines[1].split()[:2] == ["damaged", str(step(run, 4) / "rank_00001.safetensors")]
    assert "found damage in 1 of 3 checkpoints" in lines[-1] and "--resume auto" in lines[-1]
    assert before == {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    told, _ = ranks(2, VERIFY, run=tmp_path)
    assert "holds no published checkpoint" in told


def saved_with(run: Path, losses: dict[int, float | None]) -> None:
    """Checkpoints of nothing but a manifest."""
    for number, loss in losses.items():
        step(run, number).mkdir(parents=True)
        manifest = {"format": FORMAT, "files": [], "held_out_loss": loss}
        (step(run, number) / "manifest.json").write_text(sealed(manifest))


NAN = float("nan")


@pytest.mark.parametrize(
    ("keep_last", "keep_best", "kept"),
    [
        (None, True, [1, 2, 3, 4, 5, 6, 7]),
        (2, False, [5, 6, 7]),
        (2, True, [2, 5, 6, 7]),
        (1, True, [2, 6, 7]),
        (9, True, [1, 2, 3, 4, 5, 6, 7]),
    ],
)
def test_what_stays(
    tmp_path: Path, keep_last: int | None, keep_best: bool, kept: list[int]
) -> None:
    """Step 7 is of an earlier attempt: this one is at 6."""
    saved_with(tmp_path, {1: 3.0, 2: 2.0, 3: NAN, 4: None, 5: 2.0, 6: None, 7: 1.0})
    checkpoint.retain(step(tmp_path, 6), keep_last=keep_last, keep_best=keep_best)
    names = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert names == [f"step_{number:08d}" for number in kept]


def test_the_first_of_checkpoints_without_a_loss_is_not_the_best(tmp_path: Path) -> None:
    saved_with(tmp_path, {1: None, 2: None, 3: NAN})
    checkpoint.retain(step(tmp_path, 3), keep_last=1, keep_best=True)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step_00000003"]


def test_a_removal_that_was_cut_short_leaves_nothing_that_looks_complete(tmp_path: Path) -> None:
    saved_with(tmp_path, {1: None, 2: None, 3: None})
    with patch("os.unlink", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        checkpoint.retain(step(tmp_path, 3), keep_last=1, keep_best=False)
    folder = tmp_path / "checkpoints"
    assert checkpoint.published(folder) == [step(tmp_path, 2), step(tmp_path, 3)]
    checkpoint.clean(folder)
    assert sorted(folder.iterdir()) == [step(tmp_path, 2), step(tmp_path, 3)]


def test_a_run_keeps_the_last_and_the_best(ranks: Ranks, tiny: TinyRun, tmp_path: Path) -> None:
    flags = tiny.flags(tmp_path, max_steps=6, save_every=1, eval_every=1, keep_last=2)
    losses = {0: 0.5, 1: 3.0, 2: 1.0, 3: 2.0, 4: 1.5, 5: 1.2, 6: 1.1}
    ranks(2, "tests.work.run:train_as_if", flags=flags, held_out=losses)
    assert checkpoint.published(tmp_path / "checkpoints") == [
        step(tmp_path, number) for number in (2, 5, 6)
    ]


def test_losses_over_other_held_out_rows_are_not_compared(
    ranks: Ranks, tiny: TinyRun, tmp_path: Path
) -> None:
    """--eval_batches changed at a resume: from 4 of 6 rows to all of them."""
    options = {"max_steps": 6, "save_every": 1, "eval_every": 1, "keep_last": 1, "resume": "auto"}
    options["packing"] = "false"
    losses = {0: 0.6, 1: 0.5, 2: 0.4, 3: 3.0, 4: 2.0, 5: 2.5, 6: 2.6}
    job = "tests.work.run:train_as_if"
    part = tiny.flags(tmp_path, **options, eval_batches=1, stop_after=2)
    assert "the first 4 of 6 rows" in ranks(2, job, flags=part, held_out=losses)[0]
    said = ranks(2, job, flags=tiny.flags(tmp_path, **options), held_out=losses)[0]
    assert "until step 2 held-out scores were those of the first 4 rows" in said
    assert "held-out loss 3.0000 -> 2.6000 nats" in said
    assert checkpoint.published(tmp_path / "checkpoints") == [
        step(tmp_path, number) for number in (2, 4, 6)
    ]
    rows = read_records(tmp_path / "metrics.jsonl")
    assert [row.get("held_out_rows") for row in rows] == [4, 4, 4, None, None, None, None]


def test_what_a_killed_job_left_after_its_last_save_is_removed_by_the_next(
    ranks: Ranks, tiny: TinyRun, tmp_path: Path
) -> None:
    """A job that is killed between publishing and removing has kept one checkpoint too many."""
    options = {"max_steps": 3, "save_every": 1, "resume": "auto"}
    ranks(1, "tests.work.run:train", flags=tiny.flags(tmp_path, **options))
    (tmp_path / "attempts.jsonl").unlink()  # as if it had not come to its end
    few = tiny.flags(tmp_path, **options, keep_last=2)
    ranks(1, "tests.work.run:train", flags=few)
    assert checkpoint.published(tmp_path / "checkpoints") == [step(tmp_path, 2), step(tmp_path, 3)]


def test_a_checkpoint_that_may_not_be_entered_is_not_passed_over(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its step would be trained once more, and could not be saved in its place."""
    (step(run, 6) / "manifest.json").write_text("[]")
    assert newest_whole(run / "checkpoints") == step(run, 4)
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != step(run, 6))
    with pytest.raises(UserError, match="An earlier checkpoint is not taken in its place"):
        newest_whole(run / "checkpoints")
