"""Every private fact of DeepSpeed that zero3.py relies on, on 1 to 4 ranks: if an upgrade breaks
one, these say which."""

import pytest

from tests.conftest import Ranks
from tests.tiers import in_full

# On four ranks some slices are all padding; a mean over three is never exact.
SIZES = pytest.mark.parametrize("size", [in_full(1), 3, in_full(4)])


@SIZES
def test_grad_position_says_where_a_slice_lies(ranks: Ranks, size: int) -> None:
    counts = ranks(size, "tests.work.zero3:positions")
    assert counts[0] == counts[-1]
    assert counts[0][0] == 1 and counts[0][1] > 1, "one case must have several flat tensors"


@SIZES
def test_the_gradient_at_the_boundary_is_the_unclipped_fp32_mean(ranks: Ranks, size: int) -> None:
    ranks(size, "tests.work.zero3:gradients")


@SIZES
def test_the_optimizer_steps_once_per_flat_tensor(ranks: Ranks, size: int) -> None:
    counts = ranks(size, "tests.work.zero3:steps")
    assert counts[0][0] == 1 and counts[0][1] > 1


@SIZES
def test_a_projection_inside_the_step_reaches_the_live_copy(ranks: Ranks, size: int) -> None:
    ranks(size, "tests.work.zero3:projections")


@SIZES
def test_masters_written_from_outside_reach_forward(ranks: Ranks, size: int) -> None:
    ranks(size, "tests.work.zero3:written_masters")


def test_small_tensors_that_stay_whole_are_gathered_together(ranks: Ranks) -> None:
    # Left to DeepSpeed, each of the six would have an exchange of its own after every step.
    for sharded, *_, persistent in ranks(2, "tests.work.zero3:gathers"):
        assert 0 < persistent <= 2 and persistent <= sharded


@SIZES
def test_packed_bytes_are_gathered_as_they_are(ranks: Ranks, size: int) -> None:
    ranks(size, "tests.work.zero3:bytes_survive")


@SIZES
def test_masked_training_is_adamw_on_the_live_entries(ranks: Ranks, size: int) -> None:
    everyone = ranks(size, "tests.work.shards:sparse_training")
    # 3 + 1 + 35 + 2112 adapter entries: at most half of them, and all 330 of the other tensor.
    for live in zip(*everyone, strict=True):
        assert 330 < sum(live) <= 330 + (3 + 1 + 35 + 2112) // 2


def test_the_shared_memory_all_reduce_is_never_built(ranks: Ranks) -> None:
    assert ranks(2, "tests.work.zero3:shared_memory_off") == [True, True]
