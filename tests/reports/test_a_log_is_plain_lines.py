"""Output into a file: plain lines that a person can follow with tail, and no carriage returns."""

import io
import sys
import time

import pytest

from sparse_lora_dist.distributed import console
from sparse_lora_dist.distributed.console import StepProgress, with_progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    """In place of time.monotonic."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(time, "monotonic", found)
    return found


def test_steps_are_a_line_each_logging_interval_with_the_time_left(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = StepProgress(total=2000, done=1000)
    clock.now += 500.0  # the held-out loss before step 1 says nothing of a step
    for number in range(1, 7):
        clock.now += 4.0
        steps.advance(f"loss {number}.000" if number % 3 == 0 else None)
    steps.close()
    out, err = capsys.readouterr()
    assert out.splitlines() == [
        "step      1003 of 2000, loss 3.000, 1:06:28 left",
        "step      1006 of 2000, loss 6.000, 1:06:16 left",
    ]
    assert err == ""


def test_a_run_of_one_logged_step_has_a_line_too(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = StepProgress(total=3, done=0)
    clock.now += 4.0
    steps.advance("loss 1.000")
    assert capsys.readouterr().out == "step      1 of 3, loss 1.000, 0:00:08 left\n"


def test_other_long_work_has_a_line_every_half_minute(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    done = []
    for item in with_progress(range(10), "loading"):
        clock.now += 12.0
        done.append(item)
    out, err = capsys.readouterr()
    assert done == list(range(10))
    assert out.splitlines() == [
        "progress  loading: 3 of 10, 0:01:24 left",
        "progress  loading: 6 of 10, 0:00:48 left",
        "progress  loading: 9 of 10, 0:00:12 left",
    ]
    assert err == ""


def test_on_a_terminal_there_are_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    steps = StepProgress(total=4, done=1)
    steps.advance("loss 1.000")
    steps.close()
    assert "2/4" in screen.getvalue() and "loss 1.000" in screen.getvalue()
    assert list(with_progress(range(3), "loading")) == [0, 1, 2]
    assert "loading" in screen.getvalue()


def test_only_rank_0_shows_progress(
    monkeypatch: pytest.MonkeyPatch, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(console.comm, "rank", lambda: 1)
    steps = StepProgress(total=2, done=0)
    steps.advance("loss 1.000")
    for _ in with_progress(range(3), "loading"):
        clock.now += 60
    assert capsys.readouterr() == ("", "")
