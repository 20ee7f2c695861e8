"""Fixtures that every test may use."""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest

from tests.ranks import RankError, RankPool

if TYPE_CHECKING:
    from tests.fixtures.tiny_run import TinyRun

Ranks = Callable[..., list[Any]]


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
def async_io() -> None:
    """DeepSpeed's op for NVMe, built: minutes, once a machine. Skips, and says so, where it cannot
    be built."""
    from sparse_lora_dist.zero3 import nvme as zero3_nvme

    if reason := zero3_nvme.why_not():
        pytest.skip(reason)
    zero3_nvme.load_async_io()
