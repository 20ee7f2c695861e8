"""An export on a full disk, or from a file server that is away, is asked for again by Slurm."""

import errno
import os
import stat
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

from sparse_lora_dist.errors import StorageError, UserError
from sparse_lora_dist.export import export_command
from sparse_lora_dist.export.export_command import export
from sparse_lora_dist.export.export_options import load_request
from sparse_lora_dist.run_folder.identity import TRAINED_OVER
from sparse_lora_dist.system import whole_folders
from sparse_lora_dist.system.own_files import MARKER
from tests.training.test_runs_of_before import MADE

STEP = MADE / "adalora_end" / "step_00000012"


def exported(folder: Path, *more: str) -> None:
    export(load_request([str(STEP), "--output", str(folder / "out"), *more]))


def test_a_mount_point_is_filled_by_an_export_and_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its unfinished folder lies inside, and was said to be somebody else's."""
    (tmp_path / "out").mkdir()
    inode = (tmp_path / "out").stat().st_ino
    monkeypatch.setattr(whole_folders, "is_mount_point", lambda folder: folder.name == "out")
    exported(tmp_path)
    exported(tmp_path, "--overwrite")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"adapter_config.json", "README.md"} < names
    assert not [name for name in names if name.startswith(".tmp")]
    assert (tmp_path / "out").stat().st_ino == inode


@pytest.mark.parametrize("mode", [0o700, 0o2770, 0o750])
def test_a_folder_that_was_prepared_keeps_group_and_permissions(tmp_path: Path, mode: int) -> None:
    """A private export became readable for all."""
    out = tmp_path / "out"
    out.mkdir()
    group = max([os.getgid(), *os.getgroups()])
    os.chown(out, -1, group)
    out.chmod(mode)
    for more in ((), ("--overwrite",)):
        exported(tmp_path, *more)
        assert stat.S_IMODE(out.stat().st_mode) == mode and out.stat().st_gid == group


def test_the_working_directory_stays_the_one_that_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    export(load_request([str(STEP), "--output", "."]))
    assert "adapter_config.json" in os.listdir(".")


def test_an_export_that_was_copied_without_its_marker_is_replaced(tmp_path: Path) -> None:
    """``cp exported/* other/`` leaves it out."""
    exported(tmp_path)
    (tmp_path / "out" / MARKER).unlink()
    (tmp_path / "out" / TRAINED_OVER).write_text("{}")
    exported(tmp_path, "--overwrite")


def test_a_file_in_the_way_is_called_so(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="since .*/file is no folder"):
        exported(tmp_path / "file")


def failing(error: Exception) -> Any:
    def fails(*arguments: object, **named: object) -> None:
        raise error

    return fails


@pytest.mark.parametrize("where", ["clean_up", "new_folder", "write_card", "finish", "write_peft"])
@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ENOSPC])
def test_what_may_pass_ends_with_the_status_that_is_requeued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, number: int
) -> None:
    for error in (OSError(number, "it failed"), SafetensorError(f"x (os error {number})")):
        monkeypatch.setattr(export_command, where, failing(error))
        with pytest.raises(StorageError, match="could not be written to .*out: .*Check the free"):
            exported(tmp_path)
        assert not list(tmp_path.iterdir())


def test_a_checkpoint_on_a_server_that_is_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = OSError(errno.ESTALE, "Stale file handle", str(STEP))
    monkeypatch.setattr(export_command.Trained, "open", failing(error))
    with pytest.raises(StorageError, match="Stale file handle"):
        exported(tmp_path)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
def test_what_does_not_pass_ends_as_a_mistake(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr(export_command, "new_folder", failing(OSError(number, "it failed")))
    with pytest.raises(UserError, match="could not be written to") as caught:
        exported(tmp_path)
    assert not isinstance(caught.value, StorageError)
