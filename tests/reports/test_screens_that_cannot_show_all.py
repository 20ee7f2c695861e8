"""stdout that is full, closed, left by its reader, or of an encoding without the letters."""

import errno
import io
import sys
from pathlib import Path
from typing import Any

import pytest

from sparse_lora_dist.config.config import Config
from sparse_lora_dist.runtime import entry_point
from tests.reports.conftest import Left, statuses


class Broken(io.RawIOBase):
    """A stream that fails at each write."""

    def __init__(self, number: int) -> None:
        self.number = number

    def writable(self) -> bool:
        return True

    def write(self, given: Any) -> int:
        if self.number:
            raise OSError(self.number, errno.errorcode[self.number])
        return len(given)


@pytest.fixture
def status(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Statuses with which the process would have ended."""
    return statuses(monkeypatch, entry_point.os, "_exit")


def run(text: str, *, flushes: bool = False, ends: bool = False) -> None:
    def work(config: Config) -> None:
        print(text, flush=flushes)
        if ends:
            raise SystemExit(0)

    with pytest.raises(Left):
        entry_point.run_program([], lambda argv: Config(), work)


@pytest.mark.parametrize("flushes", [False, True])
@pytest.mark.parametrize("ends", [False, True])
@pytest.mark.parametrize(
    ("number", "wanted", "said"),
    [(errno.EPIPE, 141, ""), (errno.ENOSPC, 1, "error: stdout cannot be written: ENOSPC. Make")],
    ids=["reader gone", "full"],
)
def test_a_stdout_that_fails_makes_no_traceback(
    number: int,
    wanted: int,
    said: str,
    flushes: bool,
    ends: bool,
    status: list[int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    broken = Broken(number)
    stream = io.TextIOWrapper(io.BufferedWriter(broken), encoding="utf-8")
    monkeypatch.setattr(sys, "stdout", stream)
    run("x" * (100 if flushes else 100_000), flushes=flushes, ends=ends)
    shown = capsys.readouterr().err
    assert status[0] == wanted and "Traceback" not in shown
    assert shown == "" if said == "" else shown.startswith(said) and shown.count("\n") == 1
    broken.number = 0  # it is flushed once more when it is collected


def test_a_stdout_that_was_closed_leads_nowhere(
    status: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    run("x", flushes=True)
    assert status[0] == 0


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_letters_that_stdout_lacks_are_escaped(
    encoding: str, status: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding=encoding))
    run(str(Path("run_é\u0416\udcff")))
    shown = written.getvalue().decode(encoding)
    assert status[0] == 0
    assert shown.strip() in ("run_\\xe9\\u0416\\udcff", "run_é\\u0416\\udcff", "run_éЖ\\udcff")
