"""A full disk, a file server that is away: the run ends so that a batch system starts it again."""

import errno

import pytest
from safetensors import SafetensorError

from sparse_lora_dist.distributed.phases import fail_together
from sparse_lora_dist.errors import StorageError, UserError
from sparse_lora_dist.runtime import entry_point
from sparse_lora_dist.runtime.entry_point import STOPPED, USER_ERROR, run_program


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


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.ENOENT])
def test_what_does_not_pass_ends_as_a_mistake(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    error = OSError(number, "it failed")
    assert status_of(error, may_pass=True, monkeypatch=monkeypatch) == USER_ERROR


def test_the_error_is_one_sentence() -> None:
    with pytest.raises(StorageError, match="while saving: .*No space left") as error:
        with fail_together("saving", may_pass=True):
            raise OSError(errno.ENOSPC, "No space left on device")
    assert isinstance(error.value, UserError) and error.value.shared
