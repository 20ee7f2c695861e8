"""Waits and exchanges between ranks."""

from pathlib import Path

import pytest

from sparse_lora_dist.distributed.device import groups_of
from tests.conftest import Ranks


@pytest.mark.parametrize(("size", "ranks_a_node"), [(2, 2), (4, 2), (3, 1)])
def test_one_rank_of_every_node_comes_first(
    ranks: Ranks, tmp_path: Path, size: int, ranks_a_node: int
) -> None:
    """A model is downloaded once a node, and every other rank of the node finds it there."""
    found = ranks(
        size, "tests.work.comm:found_on_its_node", folder=tmp_path, ranks_a_node=ranks_a_node
    )
    for rank, files in enumerate(found):
        first = rank - rank % ranks_a_node
        assert f"from {first}" in files if rank != first else files == []


def test_tensors_are_read_in_groups_of_bounded_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparse_lora_dist.distributed.device.GROUP_ENTRIES", 10)
    sizes = {"a": 4, "b": 6, "c": 1, "d": 30, "e": 0, "f": 10}
    assert groups_of(sizes) == [["a", "b"], ["c"], ["d"], ["e", "f"]]
