"""Old checkpoints that cannot be removed, were moved, renamed, or hold a user's notes."""

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

from sparse_lora_dist import checkpoint
from sparse_lora_dist.checkpoint import own_files, save
from sparse_lora_dist.checkpoint.manifest import FORMAT, hash_of_file, sealed
from sparse_lora_dist.errors import UserError

RANK = "rank_00000.safetensors"


def saved(steps: Path, *numbers: int) -> None:
    for number in numbers:
        step = steps / f"step_{number:08d}"
        step.mkdir(parents=True)
        progress = {"step": number, "rows": 0, "tokens": 0}
        file = step / "rank_00000.safetensors"
        file.write_bytes(b"weights")
        about = {"name": file.name, "bytes": 7, "sha256": hash_of_file(file)}
        manifest = {"format": FORMAT, "files": [about], "held_out_loss": None}
        (step / "manifest.json").write_text(sealed(manifest | {"progress": progress}))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(own_files, "_warned", set())
    saved(tmp_path / "checkpoints", 1, 2, 3)
    return tmp_path / "checkpoints"


def keep_one(steps: Path) -> None:
    checkpoint.retain(steps / "step_00000003", keep_last=1, keep_best=False)


def test_a_step_that_was_moved_to_another_disk_and_linked_back_stays_there(
    steps: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    elsewhere = tmp_path / "another disk"
    (steps / "step_00000001").rename(elsewhere)
    (steps / "step_00000001").symlink_to(elsewhere)
    keep_one(steps)
    assert names(steps) == ["step_00000003"]
    assert names(elsewhere) == ["manifest.json", "rank_00000.safetensors"]
    assert "the checkpoint that it leads to stays" in capsys.readouterr().out
    checkpoint.clean(steps)
    assert names(elsewhere) == ["manifest.json", "rank_00000.safetensors"]


def test_a_file_that_cannot_be_removed_is_a_warning_and_is_tried_again(
    steps: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    unlink = os.unlink

    def busy(path: Any, **rest: Any) -> None:
        if "00000001" in str(path) and str(path).endswith(".safetensors"):
            raise OSError(errno.EBUSY, "Device or resource busy", str(path))
        unlink(path, **rest)

    monkeypatch.setattr(os, "unlink", busy)
    for _ in range(2):  # after two saves; it is said once
        keep_one(steps)
        checkpoint.clean(steps)
    assert capsys.readouterr().out.count("Device or resource busy") == 1
    assert checkpoint.published(steps) == [steps / "step_00000003"]
    monkeypatch.undo()
    keep_one(steps)
    assert names(steps) == ["step_00000003"]


def test_a_file_that_somebody_reads_over_nfs_leaves_its_folder_until_he_closes_it(
    steps: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (steps / "step_00000001" / ".nfs00000001").write_bytes(b"weights")
    keep_one(steps)
    assert "it holds .nfs00000001" in capsys.readouterr().out
    assert checkpoint.published(steps) == [steps / "step_00000003"]
    (left,) = steps.glob(".removed_step_00000001*")
    (left / ".nfs00000001").unlink()
    keep_one(steps)
    assert names(steps) == ["step_00000003"]


def test_notes_in_a_checkpoint_stay_where_they_are(
    steps: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    notes = steps / "step_00000002" / "NOTES.txt"
    notes.write_text("the good one")
    keep_one(steps)
    assert notes.read_text() == "the good one" and names(notes.parent) == ["NOTES.txt"]
    assert "it holds NOTES.txt" in capsys.readouterr().out
    assert checkpoint.published(steps) == [steps / "step_00000003"]


def test_what_only_looks_like_left_over_stays(steps: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (steps / ".tmp_step_00000007").symlink_to(tmp_path / "mine")
    for name in (".tmp_mine", ".removed_mine", ".replaced_mine", ".tmp_latest"):
        (steps / name).write_text("mine")
    (steps / ".tmp_step_00000009").mkdir()
    (steps / ".tmp_step_00000009" / "mine").write_text("mine")
    before = names(steps)
    checkpoint.clean(steps)
    keep_one(steps)
    assert names(steps) == [n for n in before if n not in ("step_00000001", "step_00000002")]
    assert (steps / ".tmp_step_00000009" / "mine").read_text() == "mine"


def test_a_step_that_was_renamed_is_neither_resumed_nor_removed(
    steps: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It would be the newest for ever, and each resume would go back to it."""
    (steps / "step_00000002").rename(steps / "step_00000099")
    assert checkpoint.newest_whole(steps) == steps / "step_00000003"
    said = capsys.readouterr().out
    assert "step_00000099 was renamed: it was saved at step 2" in said
    assert "Rename it to step_00000002" in said
    saved(steps, 100)
    checkpoint.retain(steps / "step_00000100", keep_last=1, keep_best=False)
    assert names(steps) == ["step_00000099", "step_00000100"]


@pytest.mark.parametrize("there", ["a file", "a damaged step", "a renamed step", "only ranks"])
def test_what_is_in_the_way_of_a_new_step_is_kept_under_another_name(
    steps: Path, capsys: pytest.CaptureFixture[str], there: str
) -> None:
    final = steps / "step_00000005"
    if there == "a file":
        final.write_text("mine")
    elif there == "only ranks":
        final.mkdir()
        (final / "rank_00000.safetensors").write_text("mine")
    else:
        (steps / "step_00000002").rename(final)
        if there == "a damaged step":
            (final / "manifest.json").write_text("{")
    before = final.read_bytes() if final.is_file() else (final / RANK).read_bytes()
    saved(steps / "new", 5)
    (steps / "new" / "step_00000005").rename(steps / ".tmp_step_00000005.0123456789abcdef")
    manifest = json.loads((steps / ".tmp_step_00000005.0123456789abcdef/manifest.json").read_text())
    del manifest["sha256"]
    save._publish(steps / ".tmp_step_00000005.0123456789abcdef", final, manifest)
    kept = steps / "set_aside_1" / "step_00000005"
    assert before == (kept.read_bytes() if kept.is_file() else (kept / RANK).read_bytes())
    assert f"kept      {final}, which is no intact checkpoint" in capsys.readouterr().out
    assert checkpoint.newest_whole(steps) == final


def test_checkpoints_of_a_newer_version_ask_for_that_version_and_stay(
    steps: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in steps.iterdir():
        manifest = json.loads((step / "manifest.json").read_text())
        del manifest["sha256"]
        (step / "manifest.json").write_text(sealed(manifest | {"format": FORMAT + 1}))
    with pytest.raises(UserError, match="say what to do about each"):
        checkpoint.newest_whole(steps)
    assert capsys.readouterr().out.count("Use the version that saved the checkpoint") == 3
    keep_one(steps)
    assert len(names(steps)) == 3
