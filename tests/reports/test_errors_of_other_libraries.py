"""What other libraries raise becomes one sentence; --debug shows where it came from."""

import errno
from collections.abc import Sequence
from typing import Any

import pyarrow
import pytest
import regex
import yaml

from sparse_lora_dist.config.config import Config
from sparse_lora_dist.distributed.phases import fail_together
from sparse_lora_dist.errors import Stopped, UserError, as_user_error
from sparse_lora_dist.runtime import entry_point
from sparse_lora_dist.system.small_files import parse_json
from tests.reports.conftest import Left


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (KeyError("newer"), "x.json cannot be used: KeyError: 'newer'. Mend it."),
        (AssertionError(), "x.json cannot be used: AssertionError. Mend it."),
        (TypeError("a\n  b"), "x.json cannot be used: TypeError: a b. Mend it."),
        (RecursionError("deep"), "x.json cannot be used: RecursionError: it is nested too deep."),
        (pyarrow.lib.ArrowInvalid("bad"), "ArrowInvalid: bad"),
        (pyarrow.lib.ArrowNotImplementedError("bad"), "ArrowNotImplementedError: bad"),
        (yaml.YAMLError("bad"), "YAMLError: bad"),
        (regex.error("bad"), "error: bad"),
        (OSError("no tokenizer there"), "OSError: no tokenizer there"),
        (ValueError("x" * 10_000), "x..."),
    ],
    ids=lambda value: type(value).__name__,
)
def test_the_sentence_has_the_file_the_type_and_the_text(error: Exception, said: str) -> None:
    with pytest.raises(UserError) as caught:
        with as_user_error("x.json", "Mend it."):
            raise error
    assert said in str(caught.value) and len(str(caught.value)) < 600
    assert caught.value.__cause__ is error


@pytest.mark.parametrize(
    "error", [UserError("own"), Stopped("now"), OSError(errno.EIO, "disk"), KeyboardInterrupt()]
)
def test_what_is_no_fault_of_the_file_passes(error: BaseException) -> None:
    with pytest.raises(type(error)) as caught:
        with as_user_error("x.json", "Mend it."):
            raise error
    assert caught.value is error


@pytest.mark.parametrize("text", ["[" * 100_000, "9" * 5000, "{", "", b"\xff"])
def test_json_fails_by_a_value_error_alone(text: str | bytes) -> None:
    with pytest.raises(ValueError):
        parse_json(text)


def test_an_error_of_the_disk_keeps_its_cause() -> None:
    with pytest.raises(UserError) as caught:
        with fail_together("reading x"):
            raise OSError(errno.ENOSPC, "full")
    assert isinstance(caught.value.__cause__, OSError)


def run(argv: Sequence[str], error: Exception, *, reading: bool) -> None:
    def read(argv: Sequence[str]) -> Config:
        if reading:
            raise error
        return Config()

    def work(config: Any) -> None:
        raise error

    with pytest.raises(Left):
        entry_point.run_program(argv, read, work)


@pytest.mark.parametrize(
    "argv", [["--debug"], ["--debug", "true"], ["--debug=true"], ["--debug", "--rank"]]
)
def test_debug_shows_the_traceback_of_an_error_in_the_options_too(
    argv: list[str], status: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    error = UserError("wrong")
    error.__cause__ = KeyError("deep")
    run(argv, error, reading=True)
    said = capsys.readouterr().err
    assert status == [2] and "error: wrong" in said and "KeyError: 'deep'" in said


@pytest.mark.parametrize("argv", [[], ["--debug", "false"], ["--rank", "4"]])
def test_without_debug_there_is_no_traceback(
    argv: list[str], status: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    run(argv, UserError("wrong"), reading=True)
    assert status == [2] and capsys.readouterr().err == "error: wrong\n"


def test_a_limit_on_memory_is_told_without_a_traceback(
    status: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    run([], MemoryError("Unable to allocate 4 GiB"), reading=False)
    said = capsys.readouterr().err
    assert status == [2] and "this process gets no more memory" in said
    assert "Unable to allocate 4 GiB" in said and "Traceback" not in said
