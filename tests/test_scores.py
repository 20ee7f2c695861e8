"""Exact top-k and sums over shards: any cut, any number of ranks, the bits of one process."""

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparse_lora_dist.scores import num_segments, segment_sum, segments_of, top_k
from tests.conftest import Ranks

# Few distinct numbers make ties; the odd ones are zeros of both signs, the smallest, the largest.
NUMBERS = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, 1.0, 2.5, -2.5, 1e-45, 3.4e38, -3.4e38]),
    st.floats(width=32, allow_nan=False, allow_infinity=False),
)


@st.composite
def cases(draw: st.DrawFn, world: int) -> dict[str, Any]:
    shape = draw(st.integers(1, 6)), draw(st.integers(1, 9))
    numel = shape[0] * shape[1]
    by = draw(st.sampled_from(["row", "column", "tensor"]))
    inner = draw(st.lists(st.integers(0, numel), min_size=world - 1, max_size=world - 1))
    return {
        "values": draw(st.lists(NUMBERS, min_size=numel, max_size=numel)),
        "shape": shape,
        "cuts": [0, *sorted(inner), numel],
        "by": by,
        "k": draw(st.integers(1, numel // num_segments(shape, by))),
    }


def by_sorting(values: Tensor, shape: tuple[int, int], by: Any, k: int) -> Tensor:
    """The k largest of each segment by a stable sort: the lowest index first among equals."""
    segments = segments_of(0, len(values), shape, by)
    mask = torch.zeros(len(values), dtype=torch.bool)
    for segment in range(num_segments(shape, by)):
        (index,) = torch.where(segments == segment)
        order = torch.argsort(values[index], descending=True, stable=True)
        mask[index[order[:k]]] = True
    return mask


@settings(max_examples=200, deadline=None)
@given(case=cases(world=1))
def test_one_process_chooses_what_sorting_does(case: dict[str, Any]) -> None:
    values = torch.tensor(case["values"], dtype=torch.float32)
    got = top_k(values, 0, case["shape"], case["by"], case["k"])
    assert torch.equal(got, by_sorting(values, case["shape"], case["by"], case["k"]))


@pytest.mark.parametrize("world", [2, 3, 4])
def test_any_cut_gives_the_bits_of_one_process(ranks: Ranks, world: int) -> None:
    @settings(
        max_examples=10,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        derandomize=True,
    )
    @given(batch=st.lists(cases(world=world), min_size=15, max_size=15))
    def check(batch: list[dict[str, Any]]) -> None:
        everyone = ranks(world, "tests.scores_work:choose", cases=batch)
        for case, *shards in zip(batch, *everyone, strict=True):
            values = torch.tensor(case["values"], dtype=torch.float32)
            about = (case["shape"], case["by"])
            mask = torch.cat([mask for mask, _ in shards])
            assert torch.equal(mask, top_k(values, 0, *about, case["k"]))
            for _, sums in shards:
                assert torch.equal(sums, segment_sum(values, 0, *about))

    check()


@pytest.mark.parametrize("by", ["row", "column", "tensor"])
def test_a_sum_is_as_good_as_float32_wants_it(by: Any) -> None:
    shape = (37, 501)
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0)).flatten()
    segments = segments_of(0, len(values), shape, by)
    wanted = torch.zeros(num_segments(shape, by), dtype=torch.float64)
    wanted.index_add_(0, segments, values.double())
    assert torch.allclose(segment_sum(values, 0, shape, by), wanted, rtol=0, atol=1e-8)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_on_one_rank_is_refused_by_all(ranks: Ranks, bad: float) -> None:
    for said in ranks(2, "tests.scores_work:refused", values=[1.0, bad, 2.0]):
        assert "NaN or infinity" in said


def test_a_k_that_no_segment_has_is_refused() -> None:
    for k in (0, 4):
        with pytest.raises(ValueError, match=rf"k must be in \[1, 3\], got {k}"):
            top_k(torch.zeros(6), 0, (2, 3), "row", k)


def test_selecting_costs_counts_not_scores(ranks: Ranks) -> None:
    """16 rows of 65,536: 4 passes of 1 KiB a row, twice for the all-reduce, against all scores."""
    for cost in ranks(2, "tests.scores_work:traffic", rows=16, columns=65536):
        assert cost["gather"] == 16 * 65536 * 4 // 2
        assert cost["select"] <= 4 * 2 * 16 * 1024 + 16 * 8 + 64 < cost["gather"] / 15
