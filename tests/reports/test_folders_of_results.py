"""Exports that were killed, replaced, linked or mounted: what is there before and after them."""

import errno
import json
import os
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sparse_lora_dist import checkpoint
from sparse_lora_dist.export import after_training
from sparse_lora_dist.system import whole_folders
from sparse_lora_dist.system.own_files import MARKER, Marker, read_marker, write_marker
from sparse_lora_dist.system.processes import this_process
from sparse_lora_dist.system.whole_folders import clean_up, new_folder, replace_whole


def writes(**files: str) -> Callable[[Path], int]:
    """A function that writes files of these names (an underscore stands for a dot)."""

    def write(folder: Path) -> int:
        for name, text in files.items():
            (folder / name.replace("_", ".")).write_text(text)
        return len(files)

    return write


def content(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != MARKER)
    return {str(path.relative_to(folder)): path.read_text() for path in files}


def abandoned(folder: Path) -> None:
    """As if the process that writes the folder had been killed."""
    marker = read_marker(folder)
    assert marker is not None
    gone = replace(this_process(), pid=2**22 + 1)
    write_marker(folder, replace(marker, about={"process": asdict(gone)}))


def test_what_a_killed_export_left_is_removed_by_the_next(tmp_path: Path) -> None:
    killed, alive = new_folder(tmp_path / "out"), new_folder(tmp_path / "out")
    (killed / "model.safetensors").write_text("half of")
    abandoned(killed)
    (tmp_path / ".tmp_out").mkdir()
    (tmp_path / ".tmp_out" / "mine").write_text("mine")
    (tmp_path / ".tmp_out-4711").mkdir()  # of a version that left no marker
    said = clean_up(tmp_path / "out")
    assert not killed.exists() and alive.exists()
    assert (tmp_path / ".tmp_out" / "mine").exists() and (tmp_path / ".tmp_out-4711").exists()
    assert any(f"{killed} was removed" in text for text in said)
    assert any(".tmp_out-4711" in text and "by hand" in text for text in said)


@pytest.mark.parametrize("renamed", [0, 1])
def test_an_export_interrupted_between_two_renames_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, renamed: int
) -> None:
    replace_whole(tmp_path / "out", writes(a_txt="old"))
    rename, done = os.rename, []

    def interrupted(source: Path, target: Path) -> None:
        if len(done) == renamed:
            done.append(target)
            raise KeyboardInterrupt
        done.append(target)
        rename(source, target)

    monkeypatch.setattr(os, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        replace_whole(tmp_path / "out", writes(a_txt="new"))
    assert content(tmp_path) == {"out/a.txt": "old"}


def test_what_is_left_of_a_removal_is_removed(tmp_path: Path) -> None:
    """Killed after the last file of the old folder, its marker, was removed."""
    left = tmp_path / ".replaced_out.0123456789abcdef"
    left.mkdir()
    replace_whole(tmp_path / "out", writes(a_txt="new"))
    assert not left.exists()


def test_an_export_killed_between_two_renames_gets_its_name_back(tmp_path: Path) -> None:
    replace_whole(tmp_path / "out", writes(a_txt="old"))
    (tmp_path / "out").rename(tmp_path / ".replaced_out.0123456789abcdef")
    (said,) = clean_up(tmp_path / "out")
    assert "has its name back" in said and content(tmp_path / "out") == {"a.txt": "old"}


@pytest.mark.parametrize("call", range(1, 12))
def test_killed_at_any_rename_or_removal_nothing_is_lost_and_the_next_leaves_no_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    final = tmp_path / "out"
    replace_whole(final, writes(a_txt="old", b_txt="old"))
    calls = []
    for name in ("rename", "replace", "unlink", "rmdir"):
        usual = getattr(os, name)

        def killed(*args: object, _usual: Callable[..., object] = usual, **rest: object) -> None:
            calls.append(args)
            if len(calls) >= call:  # a killed process does nothing more
                raise KeyboardInterrupt
            _usual(*args, **rest)

        monkeypatch.setattr(os, name, killed)
    monkeypatch.setattr("shutil.rmtree", lambda *args, **rest: None)
    try:
        replace_whole(final, writes(a_txt="new", c_txt="new"))
    except KeyboardInterrupt:
        pass
    monkeypatch.undo()
    for left in tmp_path.glob(".tmp_out.*"):
        if read_marker(left) is not None:
            abandoned(left)
    replace_whole(final, writes(a_txt="last"))
    assert content(tmp_path) == {"out/a.txt": "last"}


def test_files_of_others_stay_when_a_folder_is_replaced(tmp_path: Path) -> None:
    final = tmp_path / "out"
    replace_whole(final, writes(a_txt="old", b_txt="old", c_txt="old"))
    (final / "mine").write_text("mine")
    (final / "b.txt").write_text("changed by me")
    replace_whole(final, writes(a_txt="new"))
    assert content(final) == {"a.txt": "new", "b.txt": "changed by me", "mine": "mine"}


def test_a_name_that_a_file_of_others_has_is_not_taken(tmp_path: Path) -> None:
    final = tmp_path / "out"
    final.mkdir()
    (final / "a.txt").write_text("mine")
    with pytest.raises(OSError, match=r"a\.txt, which this program did not write"):
        replace_whole(final, writes(a_txt="new", b_txt="new"))
    assert content(tmp_path) == {"out/a.txt": "mine"}


def test_a_link_is_served(tmp_path: Path) -> None:
    served = tmp_path / "disk" / "served"
    replace_whole(served, writes(a_txt="old"))
    (tmp_path / "out").symlink_to(served)
    replace_whole(tmp_path / "out", writes(a_txt="new"))
    assert (tmp_path / "out").is_symlink() and content(served) == {"a.txt": "new"}
    assert os.listdir(tmp_path / "disk") == ["served"]


@pytest.mark.parametrize("is_found", [True, False])
def test_a_mount_point_is_filled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_found: bool
) -> None:
    """Whether it is found at the start or is met as EBUSY at the end."""
    final, rename = tmp_path / "out", os.rename
    replace_whole(final, writes(a_txt="old", b_txt="old"))
    inode = final.stat().st_ino

    def busy(source: Path, target: Path) -> None:
        if final in (source, target):
            raise OSError(errno.EBUSY, "Device or resource busy")
        rename(source, target)

    monkeypatch.setattr(os, "rename", busy)
    monkeypatch.setattr(whole_folders, "is_mount_point", lambda folder: is_found)
    replace_whole(final, writes(a_txt="new", c_txt="new"))
    assert content(final) == {"a.txt": "new", "c.txt": "new"}
    assert final.stat().st_ino == inode and os.listdir(tmp_path) == ["out"]
    marker = json.loads((final / MARKER).read_text())
    assert sorted(marker["names"]) == ["a.txt", "c.txt"]


def test_a_marker_of_others_is_not_believed(tmp_path: Path) -> None:
    for text in ("", "[]", "{" * 9999, '{"kind": 1, "names": [], "about": {}}'):
        (tmp_path / MARKER).write_text(text)
        assert read_marker(tmp_path) is None
    write_marker(tmp_path / "..", Marker(kind="run"))
    (tmp_path / MARKER).unlink()
    (tmp_path / MARKER).symlink_to(tmp_path.parent / MARKER)
    assert read_marker(tmp_path) is None


@pytest.fixture
def busy(monkeypatch: pytest.MonkeyPatch) -> None:
    """No file of a folder that was replaced can be removed, as one with ``chattr +i``."""
    unlink = os.unlink

    def refuse(path: Any, **rest: Any) -> None:
        if "/.replaced_" in str(path):
            raise PermissionError(errno.EPERM, "Operation not permitted", str(path))
        unlink(path, **rest)

    monkeypatch.setattr(os, "unlink", refuse)


@pytest.mark.usefixtures("busy")
def test_a_replaced_folder_that_cannot_be_removed_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    for text in ("old", "new"):
        replace_whole(tmp_path / "adapter", writes(a_txt=text), said.append)
    (left,) = tmp_path.glob(".replaced_adapter.*")
    assert (tmp_path / "adapter" / "a.txt").read_text() == "new"
    assert len(said) == 1 and said[0].startswith(f"{left} cannot be removed: [Errno 1] ")
    assert said[0].endswith(f"The new folder {tmp_path}/adapter is whole")
    monkeypatch.undo()
    replace_whole(tmp_path / "adapter", writes(a_txt="newer"), said.append)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"] and len(said) == 1


@pytest.mark.usefixtures("busy")
def test_a_run_warns_of_a_replaced_adapter_that_it_cannot_remove(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(checkpoint, "published", lambda folder: [folder])
    run = SimpleNamespace(own_type=lambda: "SHIRA")
    monkeypatch.setattr(after_training.Trained, "at", lambda path: run)
    monkeypatch.setattr(
        after_training, "write_own_type", lambda folder, trained: writes(a_txt="x")(folder)
    )
    for _ in range(2):
        after_training.save_own_type(tmp_path, tmp_path / "adapter", lambda folder: None)
    said = capsys.readouterr().out
    assert said.startswith(f"warning   {tmp_path}/.replaced_adapter.") and said.count("\n") == 1
