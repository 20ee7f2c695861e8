"""Fixtures that every test may use, and the tiers that follow from them.

    unit    starts no process and writes no model
    disk    writes a small model; starts no process
    ranks   starts ranks, launchers or other programs
    smoke   a few of all, in ``smoke.py``
    full    what ``make test`` leaves to ``make test-all``

A marker is never set by hand: the first three follow from the fixtures that a test asks for, and a
unit test that starts a process or writes a model fails.
"""

import gc
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import pytest

from tests.ranks import RankError, RankPool
from tests.smoke import is_smoke

if TYPE_CHECKING:
    from tests.fixtures.tiny_run import TinyRun

# One thread a test process: pytest runs as many of them as there are cores, on small tensors.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Collecting imports torch and transformers, faster without it (``system/imports.py``).
gc.disable()

Ranks = Callable[..., list[Any]]

PROCESSES = {"ranks", "processes", "async_io"}
MODELS = {"tiny", "model_on_disk"}
LONGEST = ("slurm", "training/test_laws", "distributed/test_launchers", "training/test_method_runs")
"""Files that take longest. They come first, so that at the end no worker waits for the other."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: not item.nodeid.removeprefix("tests/").startswith(LONGEST))
    for item in items:
        asked = set(getattr(item, "fixturenames", ()))
        tier = "ranks" if asked & PROCESSES else "disk" if asked & MODELS else "unit"
        item.add_marker(tier)
        if is_smoke(item.nodeid):
            item.add_marker("smoke")
        if "full" in asked:
            item.add_marker("full")


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session")
def processes() -> None:
    """For who starts programs other than ranks."""


@pytest.fixture(scope="session")
def model_on_disk() -> None:
    """For who writes a model other than ``tiny``."""


@pytest.fixture(scope="session")
def full() -> None:
    """For what takes long and seldom breaks: ``make test`` leaves it to ``make test-all``."""


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables that ``datasets`` reads are cached in the folder of the test."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()


@pytest.fixture(autouse=True)
def _keeps_to_its_tier(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A unit test that starts a process, or writes a model, asks for no fixture that says so."""
    markers = {mark.name for mark in request.node.iter_markers()}
    if "ranks" not in markers:
        monkeypatch.setattr(subprocess.Popen, "__init__", _refuse("starts a process", "processes"))
    if "unit" in markers and "transformers" in sys.modules:
        model = sys.modules["transformers"].PreTrainedModel
        monkeypatch.setattr(model, "save_pretrained", _refuse("writes a model", "model_on_disk"))


def _refuse(what: str, fixture: str) -> Callable[..., NoReturn]:
    def refuse(*args: object, **rest: object) -> NoReturn:
        pytest.fail(f"this test {what}: let it ask for the fixture {fixture}")

    return refuse


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """``ranks(n, "module:function", **arguments)``: run it on n real ranks, return what each
    returned."""
    pools: dict[int, RankPool] = {}

    def run(size: int, function: str, **arguments: Any) -> list[Any]:
        if size not in pools:
            pools[size] = RankPool(size)
        try:
            return pools[size].run(function, **arguments)
        except RankError:
            pools.pop(size).close()  # a group whose ranks failed apart cannot be used again
            raise

    yield run
    for pool in pools.values():
        pool.close()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> "TinyRun":
    """A model and data small enough for a run of seconds."""
    from tests.fixtures.tiny_run import write_tiny_run  # late: it imports torch and transformers

    return write_tiny_run(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def async_io(full: None) -> None:
    """DeepSpeed's op for NVMe, built: minutes, once a machine. Skips, and says so, where it cannot
    be built."""
    from sparse_lora_dist.zero3 import nvme as zero3_nvme

    if reason := zero3_nvme.why_not():
        pytest.skip(reason)
    zero3_nvme.load_async_io()
