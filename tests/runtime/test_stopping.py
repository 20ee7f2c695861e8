"""A run that is told to stop: it ends where all ranks are together, saved, and goes on as if it had
not been."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sparse_lora_dist.config.checks import seconds_in
from sparse_lora_dist.run_folder.metrics_file import read_records
from tests.conftest import Ranks
from tests.fixtures.same_end import check_same
from tests.fixtures.tiny_run import TinyRun
from tests.tiers import in_full

pytestmark = pytest.mark.usefixtures("processes")

TRAIN, STOPPED = "tests.work.run:train", "tests.work.stop:stopped"
STEPS = 8
# IncreLoRA decides twice; two micro-batches a step; evaluations of two batches.
OPTIONS = {
    "max_steps": STEPS,
    "micro_batch_size": 1,
    "gradient_accumulation_steps": 2,
    "eval_every": 2,
    "save_every": 3,
    "method": "increlora",
    "increlora_every": 2,
}


@pytest.fixture(scope="module")
def undisturbed(ranks: Ranks, tiny: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    ranks(2, TRAIN, flags=tiny.flags(folder, **OPTIONS))
    return folder


@pytest.mark.parametrize(
    ("point", "call", "name", "rank", "saved"),
    [
        ("micro-batch", 5, "SIGUSR1", 1, 2),  # the first of step 3 is done, the second not
        ("evaluation", 3, "SIGTERM", 0, 2),  # of step 2, whose evaluation is owed
        ("saving", 1, "SIGINT", 1, 3),
        in_full("publishing", 2, "SIGUSR1", 0, 2),
        in_full("after a step", 8, "SIGTERM", 1, 8),  # the last
        in_full("micro-batch", 1, "SIGTERM", 1, None),
    ],
)
def test_stopped_and_resumed_is_uninterrupted(
    ranks: Ranks,
    tiny: TinyRun,
    undisturbed: Path,
    tmp_path: Path,
    point: str,
    call: int,
    name: str,
    rank: int,
    saved: int | None,
) -> None:
    flags = tiny.flags(tmp_path, **OPTIONS, resume="auto")
    told = ranks(
        2, "tests.work.stop:stopped", flags=flags, point=point, call=call, name=name, rank=rank
    )
    assert told == [name, name]
    found = sorted(p.name for p in (tmp_path / "checkpoints").glob("*"))
    if saved is None:
        assert found == []
    else:
        assert f"step_{saved:08d}" == found[-1], found
        assert (tmp_path / "checkpoints" / "latest").read_text() == f"step_{saved:08d}\n"
    assert not (tmp_path / "adapter").exists()
    ranks(2, TRAIN, flags=flags)
    check_same(tmp_path, undisturbed)


@pytest.mark.usefixtures("full")
def test_stopped_twice_in_what_it_owes_and_begun_elsewhere(
    ranks: Ranks, tiny: TinyRun, undisturbed: Path, tmp_path: Path
) -> None:
    """Once in the evaluation of step 2, again when that was made up, then before a step is made in
    a folder of its own."""
    flags = tiny.flags(tmp_path / "a", **OPTIONS, resume="auto")
    told = [{"point": "evaluation", "call": 3}, {"point": "micro-batch", "call": 1}]
    for where in told:
        ranks(2, STOPPED, flags=flags, **where, name="SIGTERM", rank=0)
    steps = [row["step"] for row in read_records(tmp_path / "a" / "metrics.jsonl")]
    assert steps == [0, 1, 2]
    checkpoint = tmp_path / "a" / "checkpoints" / "step_00000002"
    flags = tiny.flags(tmp_path / "b", **OPTIONS)
    first = [*flags, "--resume", str(checkpoint)]
    ranks(2, STOPPED, flags=first, point="micro-batch", call=1, name="SIGTERM", rank=1)
    ranks(2, TRAIN, flags=[*flags, "--resume", "auto"])
    one, other = (
        r / "adapter" / "adapter_model.safetensors" for r in (tmp_path / "b", undisturbed)
    )
    assert one.read_bytes() == other.read_bytes()


def test_the_clock_stops_a_run_too(
    ranks: Ranks, tiny: TinyRun, undisturbed: Path, tmp_path: Path
) -> None:
    flags = tiny.flags(tmp_path, **OPTIONS, resume="auto")
    told = ranks(2, "tests.work.stop:out_of_time", flags=flags, seconds=4)
    assert told == ["--time_limit", "--time_limit"]
    ranks(2, TRAIN, flags=flags)
    check_same(tmp_path, undisturbed)


SLEEPER = """
import time
from sparse_lora_dist.runtime.stop_signals import listening
with listening(None):
    print("ready", flush=True)
    while True:
        time.sleep(1)
"""


@pytest.mark.parametrize(
    ("first", "second", "pause", "ends"),
    [
        (signal.SIGINT, signal.SIGTERM, 2.5, True),
        in_full(signal.SIGUSR1, signal.SIGINT, 2.5, True),
        (signal.SIGINT, signal.SIGTERM, 0.0, False),  # the same wish, through a launcher
        in_full(signal.SIGUSR1, signal.SIGTERM, 2.5, False),  # a scheduler's second word
    ],
)
def test_a_second_signal_ends_at_once_if_it_is_a_persons(
    first: signal.Signals, second: signal.Signals, pause: float, ends: bool
) -> None:
    process = subprocess.Popen([sys.executable, "-c", SLEEPER], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    while process.stdout.readline() != "ready\n":
        pass
    process.send_signal(first)
    time.sleep(pause)
    process.send_signal(second)
    if ends:
        assert process.wait(timeout=60) == 128 + second
    else:
        time.sleep(1)
        assert process.poll() is None
        process.kill()
        process.wait()


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90s", 90),
        ("30m", 1800),
        ("1.5h", 5400),
        ("5:30", 330),
        ("2:00:00", 7200),
        ("1-12:00:00", 129600),
        ("90:00", 5400),
        ("100:59:59", 363599),
    ],
)
def test_durations(text: str, seconds: float) -> None:
    assert seconds_in(text) == seconds


@pytest.mark.parametrize("text", ["90", "-1s", "2 days", ""])
def test_no_durations(text: str) -> None:
    with pytest.raises(ValueError, match="a duration is written like"):
        seconds_in(text)


@pytest.mark.parametrize("text", ["99:99", "1:60:00", "1:00:60", "1-24:00:00", "0:60"])
def test_parts_of_a_duration_that_are_too_large_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"parts after the first must be below 60.*Write e\.g\."):
        seconds_in(text)
