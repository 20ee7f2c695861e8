"""An export on a full disk, or from a file server that is away, is asked for again by Slurm."""

import errno
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

from sparse_lora_dist.errors import StorageError, UserError
from sparse_lora_dist.export import export_command
from sparse_lora_dist.export.export_command import export
from sparse_lora_dist.export.export_options import load_request
from tests.training.test_runs_of_before import MADE

STEP = MADE / "adalora_end" / "step_00000012"


def exported(folder: Path) -> None:
    export(load_request([str(STEP), "--output", str(folder / "out")]))


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
