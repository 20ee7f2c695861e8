"""Users had run folders on file systems that refuse chmod (exFAT, CIFS) or fsync of a folder
(FUSE): the runs ended at their first checkpoint."""

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sparse_lora_dist.system.atomic_files import sync, sync_all
from sparse_lora_dist.system.tensor_files import save_file


def refuse_chmod(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def chmod(path: object, *args: object, **kwargs: object) -> None:
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(os, "chmod", chmod)


@pytest.mark.parametrize("number", [errno.EPERM, errno.EACCES, errno.ENOTSUP, errno.ENOSYS])
def test_a_file_of_tensors_needs_no_chmod(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    refuse_chmod(number, monkeypatch)
    save_file({"a": torch.ones(3)}, tmp_path / "a.safetensors", metadata=None)
    assert load_file(tmp_path / "a.safetensors")["a"].tolist() == [1, 1, 1]


def test_a_disk_that_fails_at_chmod_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_chmod(errno.EIO, monkeypatch)
    with pytest.raises(OSError, match="Input/output error"):
        save_file({"a": torch.ones(3)}, tmp_path / "a.safetensors", metadata=None)


def refuse_fsync(
    number: int, of_kind: Callable[[int], bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync = os.fsync

    def refuse(descriptor: int) -> None:
        if of_kind(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", refuse)


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS])
def test_folders_that_cannot_be_synced_are_passed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "file").write_text("x")
    refuse_fsync(number, stat.S_ISDIR, monkeypatch)
    sync_all(tmp_path)


@pytest.mark.parametrize(
    ("number", "of_kind"), [(errno.EIO, stat.S_ISDIR), (errno.EINVAL, stat.S_ISREG)]
)
def test_a_sync_that_fails_is_an_error(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    of_kind: Callable[[int], bool],
) -> None:
    (tmp_path / "file").write_text("x")
    refuse_fsync(number, of_kind, monkeypatch)
    with pytest.raises(OSError, match=os.strerror(number)):
        sync_all(tmp_path)


def test_an_error_of_sync_names_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_fsync(errno.EIO, stat.S_ISDIR, monkeypatch)
    with pytest.raises(OSError, match="Input/output error") as error:
        sync(tmp_path)
    assert error.value.filename == str(tmp_path)
