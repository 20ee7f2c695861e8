"""Waits and exchanges between ranks."""

from pathlib import Path

import pytest

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
