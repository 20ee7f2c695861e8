"""A full disk, a file server that is away: the run ends so that a batch system starts it again."""

import errno
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from safetensors import SafetensorError

from sparse_lora_dist.base_model.cache import lookup
from sparse_lora_dist.distributed.phases import fail_together
from sparse_lora_dist.errors import StorageError, UserError
from sparse_lora_dist.run_folder import lock as run_lock
from sparse_lora_dist.runtime import entry_point
from sparse_lora_dist.runtime.entry_point import STOPPED, USER_ERROR, run_program
from sparse_lora_dist.system import atomic_files, own_files, whole_folders
from sparse_lora_dist.system.atomic_files import write_whole
from sparse_lora_dist.training import job, own_folder


class Ended(BaseException):
    pass


def status_of(error: Exception, *, may_pass: bool, monkeypatch: pytest.MonkeyPatch) -> int:
    """Exit status of a program that meets an error while it saves, or while it reads."""
    codes: list[int] = []

    def ends(code: int) -> None:
        codes.append(code)
        raise Ended

    def work(config: object) -> None:
        with fail_together("saving", may_pass=may_pass):
            raise error

    monkeypatch.setattr(entry_point, "exit_process", ends)
    with pytest.raises(Ended):
        run_program([], lambda argv: _Config(), work)  # type: ignore[arg-type, return-value]
    return codes[0]


class _Config:
    class run:
        debug = True


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ENOSPC])
def test_what_may_pass_ends_with_the_status_that_is_requeued(
    number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    errors = (OSError(number, "it failed"), SafetensorError(f"I/O error: x (os error {number})"))
    for error in errors:
        assert status_of(error, may_pass=True, monkeypatch=monkeypatch) == STOPPED
        assert status_of(error, may_pass=False, monkeypatch=monkeypatch) == USER_ERROR


def test_a_disk_that_became_read_only_while_training_is_requeued(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The start has refused a folder that cannot be written, and does so if it stays read-only."""
    error = OSError(errno.EROFS, "Read-only file system")
    assert status_of(error, may_pass=True, monkeypatch=monkeypatch) == STOPPED
    assert status_of(error, may_pass=False, monkeypatch=monkeypatch) == USER_ERROR


@pytest.mark.parametrize("number", [errno.EACCES, errno.ENOENT])
def test_what_does_not_pass_ends_as_a_mistake(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    error = OSError(number, "it failed")
    assert status_of(error, may_pass=True, monkeypatch=monkeypatch) == USER_ERROR


def test_the_error_is_one_sentence() -> None:
    with pytest.raises(StorageError, match="while saving: .*No space left") as error:
        with fail_together("saving", may_pass=True):
            raise OSError(errno.ENOSPC, "No space left on device")
    assert isinstance(error.value, UserError) and error.value.shared


def full(*args: object, **kwargs: object) -> Any:
    raise OSError(errno.ENOSPC, "No space left on device")


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_file_that_has_no_room_is_named(tmp_path: Path) -> None:
    """A write knows the number of its file only, so the system names no path."""
    with files_of_at_most(4), pytest.raises(OSError, match="run.yaml") as error:
        write_whole(tmp_path / "run.yaml", "method: lora")
    assert str(tmp_path) in str(error.value)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_at_the_start_is_requeued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A requeued job finds the disk that ended it still full: it must not give up there."""
    monkeypatch.setattr(atomic_files, "create", full)
    with pytest.raises(StorageError, match=f"while locking {tmp_path}/run: .*No space"):
        with run_lock.held(tmp_path / "run"):
            pass
    assert not list(tmp_path.iterdir())


def test_a_full_disk_before_the_adapter_is_written_is_requeued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own_files.write_marker(tmp_path, own_files.Marker(kind="run"))
    monkeypatch.setattr(own_folder, "write_marker", full)
    with pytest.raises(StorageError, match=f"while writing {tmp_path}/adapter: .*No space"):
        job.Job._export(cast(job.Job, SimpleNamespace(folder=tmp_path)))


def test_an_export_on_a_full_disk_leaves_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(own_files, "write_whole", full)
    with pytest.raises(OSError, match="No space left"):
        whole_folders.replace_whole(tmp_path / "e", lambda folder: 0)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_base_cache_on_a_full_disk_or_quota_is_requeued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def mkdir(path: Path, *args: object, **kwargs: object) -> None:
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(Path, "mkdir", mkdir)
    with pytest.raises(StorageError) as error, fail_together("opening --base_cache"):
        lookup._check_writable(tmp_path / "cache")
    said = str(error.value)
    assert said.startswith(f"--base_cache {tmp_path}/cache cannot be made: [Errno {number}]")
    assert "Free space there" in said


def test_a_base_cache_that_cannot_be_a_folder_says_why(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"is not a writable folder \(Not a directory\)") as error:
        lookup._check_writable(tmp_path / "file" / "cache")
    assert not isinstance(error.value, StorageError)
