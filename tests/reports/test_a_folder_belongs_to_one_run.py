"""Runs that are started, forked, moved, repeated or edited in a folder that holds something."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Ranks
from tests.fixtures.tiny_run import TinyRun
from tests.work.edit import FIVE

pytestmark = pytest.mark.usefixtures("processes")
TRIED, EDITED = "tests.work.folders:tried", "tests.work.folders:edited"


def content(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="module")
def made(ranks: Ranks, tiny: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of three steps, all saved."""
    folder = tmp_path_factory.mktemp("made") / "run"
    ranks(1, TRIED, flags=tiny.flags(folder, max_steps=3, save_every=1))
    return folder


def step(run: Path, number: int) -> Path:
    return run / "checkpoints" / f"step_{number:08d}"


def edit_flags(tiny: TinyRun, folder: Path, **options: Any) -> list[str]:
    edits = folder.parent / "edits.json"
    edits.write_text(json.dumps(FIVE))
    usual = {"model": tiny.model, "edits": edits, "output_dir": folder, "precision": "fp32"}
    usual |= {"max_steps": 1, "fluency_tokens": 0, "number": "0:2", "rank": 2}
    usual |= {"method": "lora", "learning_rate": 1e-2, "sequence_length": 64, **options}
    return [word for name, value in usual.items() for word in (f"--{name}", str(value))]


def test_a_fork_of_one_run_into_the_folder_of_another_is_refused(
    ranks: Ranks, tiny: TinyRun, made: Path, tmp_path: Path
) -> None:
    other = shutil.copytree(made, tmp_path / "other")
    before = content(other)
    flags = tiny.flags(other, max_steps=3, resume=step(made, 1), stop_after=2)
    (said,) = ranks(1, TRIED, flags=flags)
    assert said.startswith(f"error: --output_dir {other} already holds a run")
    assert content(other) == before


def test_a_fork_begins_in_an_empty_folder_and_may_be_begun_again_there(
    ranks: Ranks, tiny: TinyRun, made: Path, tmp_path: Path
) -> None:
    flags = tiny.flags(tmp_path / "fork", max_steps=3, resume=step(made, 1))
    (said,) = ranks(1, TRIED, flags=flags)
    assert f"resumes   {step(made, 1)}, step 1" in said
    (said,) = ranks(1, TRIED, flags=flags)
    assert f"resumes   {step(made, 1)}, step 1" in said
    assert "kept      step_00000003, later than step 1" in said
    found = ["latest", "set_aside_1", "step_00000001", "step_00000003"]
    assert names(tmp_path / "fork" / "checkpoints") == found


def test_a_new_run_begins_in_no_folder_of_somebody_elses_files(
    ranks: Ranks, tiny: TinyRun, made: Path, tmp_path: Path
) -> None:
    """Not even if one of them is the adapter that it begins from."""
    shutil.copytree(made / "adapter", tmp_path / "project" / "adapter")
    (tmp_path / "project" / "ranks").mkdir()
    (tmp_path / "project" / "ranks" / "r.csv").write_text("mine")
    (tmp_path / "project" / "run.yaml").write_text("mine: 1")
    before = content(tmp_path)
    adapter = {"init_adapter": tmp_path / "project" / "adapter"}
    flags = tiny.flags(tmp_path / "project", max_steps=1, **adapter)
    for more in ([], ["--resume", "auto"]):
        (said,) = ranks(1, TRIED, flags=[*flags, *more])
        assert said.startswith("error: ") and "it holds adapter, ranks, run.yaml" in said
    assert content(tmp_path) == before


def test_a_moved_run_goes_on_where_it_is(ranks: Ranks, tiny: TinyRun, tmp_path: Path) -> None:
    ranks(1, TRIED, flags=tiny.flags(tmp_path / "a", max_steps=3, stop_after=2))
    (tmp_path / "a").rename(tmp_path / "b")
    flags = ["--config", str(tmp_path / "b" / "run.yaml"), "--resume", "auto"]
    (said,) = ranks(1, TRIED, flags=[*flags, "--stop_after", "null"])
    assert f"the run of {tmp_path}/a was moved, and goes on in {tmp_path}/b" in said
    assert f"resumes   {step(tmp_path / 'b', 2)}, step 2" in said
    assert names(tmp_path) == ["b"]


def test_a_run_that_has_nothing_to_resume_says_so(
    ranks: Ranks, tiny: TinyRun, tmp_path: Path
) -> None:
    flags = tiny.flags(tmp_path / "a", max_steps=1, resume="auto")
    (said,) = ranks(1, TRIED, flags=flags)
    assert f"resumes   nothing: {tmp_path}/a holds no checkpoint" in said


def dates_of(folder: Path) -> dict[Path, int]:
    return {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}


def test_a_finished_run_that_is_submitted_again_says_so_and_keeps_its_record(
    ranks: Ranks, tiny: TinyRun, made: Path
) -> None:
    before, dates = content(made), dates_of(made)
    flags = tiny.flags(made, max_steps=3, save_every=1, resume="auto", learning_rate=0.5)
    (said,) = ranks(1, TRIED, flags=flags)
    assert f"finished  {made} has made all its 3 steps already. Nothing is trained" in said
    assert "have no effect: learning_rate 0.01 -> 0.5" in said
    assert (content(made), dates_of(made)) == (before, dates)


def test_notes_beside_and_in_the_adapter_stay_when_a_run_goes_on(
    ranks: Ranks, tiny: TinyRun, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    ranks(1, TRIED, flags=tiny.flags(run, max_steps=3, stop_after=1))
    (run / "adapter" / "NOTES.txt").write_text("mine")
    (run / "ranks").mkdir()
    (run / "ranks" / "r.csv").write_text("mine")
    (run / "stages.txt").write_text("mine")
    (said,) = ranks(1, TRIED, flags=tiny.flags(run, max_steps=3, resume="auto"))
    assert "opens in peft.PeftModel" in said
    for name in ("adapter/NOTES.txt", "ranks/r.csv", "stages.txt"):
        assert (run / name).read_text() == "mine"


def test_an_adapter_of_another_run_in_the_place_of_this_ones_stays(
    ranks: Ranks, tiny: TinyRun, tmp_path: Path, made: Path
) -> None:
    run = tmp_path / "run"
    ranks(1, TRIED, flags=tiny.flags(run, max_steps=3, stop_after=1))
    shutil.rmtree(run / "adapter")
    shutil.copytree(made / "adapter", run / "adapter")
    before = content(run)
    (said,) = ranks(1, TRIED, flags=tiny.flags(run, max_steps=3, resume="auto"))
    assert "error: " in said and "which another run or export has written" in said
    assert content(run) == before


def test_an_adapter_that_is_served_from_another_folder_is_renewed_there(
    ranks: Ranks, tiny: TinyRun, tmp_path: Path
) -> None:
    run, served = tmp_path / "run", tmp_path / "served"
    ranks(1, TRIED, flags=tiny.flags(run, max_steps=3, stop_after=1))
    (run / "adapter").rename(served)
    (run / "adapter").symlink_to(served)
    old = (served / "adapter_model.safetensors").read_bytes()
    for last in (2, 3):
        flags = tiny.flags(run, max_steps=3, resume="auto", stop_after=last)
        (said,) = ranks(1, TRIED, flags=flags)
        assert "opens in peft.PeftModel" in said
    assert (run / "adapter").is_symlink()
    assert (served / "adapter_model.safetensors").read_bytes() != old
    assert not [name for name in names(tmp_path) if name.startswith(".")]


def test_an_edit_replaces_an_earlier_edit_and_no_training_run(
    ranks: Ranks, tiny: TinyRun, made: Path, tmp_path: Path
) -> None:
    before = content(made)
    (said,) = ranks(1, EDITED, flags=edit_flags(tiny, made, overwrite="true"))
    assert said.startswith("error: ") and "holds a run of launcher/train.py" in said
    assert content(made) == before
    (made.parent / "edits.json").unlink()

    user = tmp_path / "user"
    (user / "adapter").mkdir(parents=True)
    (user / "run.yaml").write_text("name: hydra")
    (user / "adapter" / "mine").write_text("mine")
    (said,) = ranks(1, EDITED, flags=edit_flags(tiny, user, overwrite="true"))
    assert said.startswith("error: ") and "it holds adapter, run.yaml" in said
    assert content(user) == {"run.yaml": b"name: hydra", "adapter/mine": b"mine"}


def test_an_edit_whose_checkpoints_lie_on_another_disk_is_replaced_as_a_whole(
    ranks: Ranks, tiny: TinyRun, tmp_path: Path
) -> None:
    run, disk = tmp_path / "run", tmp_path / "disk"
    (said,) = ranks(1, EDITED, flags=edit_flags(tiny, run))
    assert "opens in peft.PeftModel" in said
    (run / "checkpoints").rename(disk)
    (run / "checkpoints").symlink_to(disk)
    (disk / "mine").write_text("mine")
    flags = edit_flags(tiny, run, overwrite="true", max_steps=2)
    (said,) = ranks(1, EDITED, flags=flags)
    assert "opens in peft.PeftModel" in said
    assert names(disk) == ["latest", "mine", "step_00000002"]
    assert (run / "checkpoints").is_symlink() and (run / "edits.json").exists()


def test_a_run_of_a_version_without_markers_counts_as_marked(
    ranks: Ranks, tiny: TinyRun, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    ranks(1, TRIED, flags=tiny.flags(run, max_steps=3, stop_after=1))
    for marker in (run / ".sparse_lora_dist.json", run / "adapter" / ".sparse_lora_dist.json"):
        marker.unlink()
    for name in ("chat_template.jinja", "generation_config.json"):  # such a version wrote neither
        (run / "adapter" / name).unlink(missing_ok=True)
    (said,) = ranks(1, TRIED, flags=tiny.flags(run, max_steps=3))
    assert "already holds a run" in said
    (said,) = ranks(1, TRIED, flags=tiny.flags(run, max_steps=3, resume="auto"))
    assert "resumes" in said and "opens in peft.PeftModel" in said
    (manifest,) = step(run, 3).glob("manifest.json")
    assert (run / ".sparse_lora_dist.json").exists() and manifest.exists()
