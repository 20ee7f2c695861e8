"""The lean part of ``make chaos``: each kind of moment in its turn, and disks that fail."""

import os
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chaos import harness, moments
from tests.fixtures.tiny_run import TinyRun

pytestmark = [pytest.mark.usefixtures("processes"), pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def undisturbed(tiny: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    assert harness.attempt(harness.flags_of(tiny, folder), None)
    return folder


IN_TURN = [
    ("a backward", 13, False, 1, False),
    ("renaming", 1, True, 0, True),
    ("restoring", 3, False, 1, True),
    (moments.HALF, 2, False, 1, False),
    ("removing a folder", 3, False, 0, True),
    ("sealing a manifest", 2, False, 0, False),
    ("a decision", 1, True, 1, True),
    ("replacing a file", 6, False, 0, True),
]
"""Moment, the how manieth, after it, rank, everybody."""


@pytest.mark.usefixtures("full")
def test_killed_again_and_again_it_comes_to_the_same_end(
    tiny: TinyRun, undisturbed: Path, tmp_path: Path
) -> None:
    flags, story = harness.flags_of(tiny, tmp_path), harness.Story()
    for moment, call, after, victim, everybody in IN_TURN:
        plan = {
            "moment": moment,
            "call": call,
            "after": after,
            "victim": victim,
            "everybody": everybody,
        }
        harness.killed(flags, tmp_path, plan, story)
    assert len(story.kills) >= 6, story
    assert max(story.lost_steps) <= harness.EVERY + 1, story
    assert harness.attempt(flags, None)
    harness.check_end(tmp_path, undisturbed)


def test_drawn_moments_are_of_every_kind() -> None:
    calls = [dict.fromkeys([*moments.MOMENTS, moments.HALF], 3)] * harness.RANKS
    numbers = random.Random(0)
    kinds = {moments.drawn(numbers, calls, 1.0)["moment"] for _ in range(300)}
    assert kinds == {*moments.MOMENTS, moments.HALF, moments.ANY_TIME}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 300 kB, which takes the first checkpoints of a run and no more."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("needs leave to mount a small tmpfs: run as root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def remount(folder: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)


@pytest.mark.usefixtures("full")
def test_a_full_disk_and_one_that_is_read_only_lose_nothing(
    tiny: TinyRun, undisturbed: Path, small_disk: Path
) -> None:
    run = small_disk / "run"
    flags = harness.flags_of(tiny, run)
    with harness.fresh_ranks() as pool:
        for said in pool.run("tests.work.run:refusal", flags=flags):
            assert "No space left" in said and str(run) in said
    last = harness.newest(run)
    assert last > 0
    assert not list((run / "checkpoints").glob(".tmp_*")), "what was half written takes no room"

    remount(small_disk, "ro")
    with harness.fresh_ranks() as pool:
        for said in pool.run("tests.work.run:refusal", flags=flags):
            assert "Read-only file system" in said or "is not writable" in said
    assert harness.newest(run) == last

    remount(small_disk, "rw,size=100m")
    (run / "checkpoints" / "latest").write_text("step_00099999\n")
    assert harness.attempt(flags, None)
    harness.check_end(run, undisturbed)
