"""Exact top-k and sums over shards: any cut, any number of ranks, the bits of one process."""

from dataclasses import replace
from math import prod
from typing import get_args

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparse_lora_dist.methods.protocol.method import By, Scores
from sparse_lora_dist.sparsity.sharded_scores import (
    GROUP_ENTRIES,
    GROUP_SEGMENTS,
    ShardScores,
    falling_keys,
    num_segments,
    segments_of,
)
from tests.conftest import Ranks
from tests.fixtures.whole_scores import WholeScores
from tests.tiers import in_full
from tests.work.scores import Part, Question, Questions, answers, answers_in_groups, shard_scores

# Few distinct numbers make ties; the odd ones are zeros of both signs, the smallest, the largest.
ODD_NUMBERS = [0.0, -0.0, 1.0, 1.0, 2.5, -2.5, 1e-45, 3.4e38, -3.4e38]
NUMBERS = st.one_of(
    st.sampled_from(ODD_NUMBERS),
    st.floats(width=32, allow_nan=False, allow_infinity=False),
)
SHAPES = st.one_of(
    st.tuples(st.integers(1, 9)),
    st.tuples(st.integers(1, 6), st.integers(1, 9)),
    st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3)),
)


@st.composite
def questions_about_a_tensor(draw: st.DrawFn, world: int) -> Question:
    shape = draw(SHAPES)
    numel = prod(shape)
    by = draw(st.sampled_from(get_args(By)))
    inner = draw(st.lists(st.integers(0, numel), min_size=world - 1, max_size=world - 1))
    return Question(
        values=draw(st.lists(NUMBERS, min_size=numel, max_size=numel)),
        living=draw(st.lists(st.booleans(), min_size=numel, max_size=numel)),
        shape=shape,
        cuts=(0, *sorted(inner), numel),
        by=by,
        k=draw(st.integers(1, numel // num_segments(shape, by))),
    )


def cases(world: int) -> st.SearchStrategy[Questions]:
    """Several tensors, in any order of their names."""
    names = st.sampled_from(["a", "b", "c", "d", "e"])
    return st.dictionaries(names, questions_about_a_tensor(world), min_size=1, max_size=5)


def whole_scores(questions: Questions) -> WholeScores:
    return WholeScores(
        {name: torch.tensor(q.values).view(q.shape) for name, q in questions.items()},
        {name: torch.tensor(q.living).view(q.shape) for name, q in questions.items()},
    )


def in_one_component(questions: Questions) -> Questions:
    return {name: replace(q, cuts=(0, len(q.values))) for name, q in questions.items()}


def scores_of(**tensors: torch.Tensor) -> ShardScores:
    return shard_scores(
        {
            name: Question(t.flatten().tolist(), [], tuple(t.shape), (0, t.numel()), "row", 1)
            for name, t in tensors.items()
        },
        rank=0,
    )


@settings(max_examples=200, deadline=None)
@given(questions=cases(world=1))
def test_one_process_finds_what_sorting_and_adding_do(questions: Questions) -> None:
    masks, masks_with_ties, spread, sums, living = answers(questions)
    whole: Scores = whole_scores(questions)
    by = {name: q.by for name, q in questions.items()}
    k = {name: q.k for name, q in questions.items()}
    wanted_masks, wanted_with_ties = whole.top_k(k, by), whole.top_k(k, by, "all")
    wanted_sums, wanted_living = whole.sums(by), whole.live(by)
    assert shard_scores(questions, 0).shapes == whole.shapes
    for name, q in questions.items():
        assert torch.equal(masks[name], wanted_masks[name])
        assert torch.equal(masks_with_ties[name], wanted_with_ties[name])
        assert torch.equal(living[name], wanted_living[name])
        assert torch.equal(spread[name], whole.spread(name, sums[name], q.by))
        error = 2.0**-40 * max(abs(value) for value in q.values) * len(q.values)
        assert torch.allclose(sums[name], wanted_sums[name], rtol=0, atol=error)


@pytest.mark.parametrize("world", [in_full(2), 3, in_full(4)])
def test_any_cut_in_any_groups_gives_the_bits_of_one_process(ranks: Ranks, world: int) -> None:
    in_groups = st.tuples(
        cases(world), st.sampled_from([1, 9, GROUP_ENTRIES]), st.sampled_from([1, GROUP_SEGMENTS])
    )

    @settings(
        max_examples=10,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        derandomize=True,
    )
    @given(batch=st.lists(in_groups, min_size=5, max_size=5))
    def check(batch: list[tuple[Questions, int, int]]) -> None:
        everyone = ranks(world, "tests.work.scores:answers_in_groups", cases=batch)
        whole = [(in_one_component(case[0]), GROUP_ENTRIES, GROUP_SEGMENTS) for case in batch]
        for wanted, *shards in zip(answers_in_groups(whole), *everyone, strict=True):
            assert [shard[3:] for shard in shards] == [wanted[3:]] * world
            for part in range(3):
                for name, whole_part in wanted[part].items():
                    assert [x for shard in shards for x in shard[part][name]] == whole_part

    check()


@settings(max_examples=50, deadline=None)
@given(
    questions=cases(world=1),
    entries=st.sampled_from([1, 9, GROUP_ENTRIES]),
    segments=st.sampled_from([1, 4, GROUP_SEGMENTS]),
)
def test_where_a_group_ends_changes_no_bit(
    questions: Questions, entries: int, segments: int
) -> None:
    whole, cut = answers_in_groups(
        [(questions, GROUP_ENTRIES, GROUP_SEGMENTS), (questions, entries, segments)]
    )
    assert cut == whole


@pytest.mark.parametrize("by", get_args(By))
def test_a_sum_is_as_good_as_float32_wants_it(by: By) -> None:
    values = torch.randn(37, 501, generator=torch.Generator().manual_seed(0))
    got = scores_of(w=values).sums({"w": by})["w"]
    assert torch.allclose(got, WholeScores({"w": values}).sums({"w": by})["w"], rtol=0, atol=1e-8)


def test_a_tensor_is_summed_on_its_own_scale() -> None:
    small, large = torch.full((1, 5), 3e-30), torch.full((1, 5), 3e30)
    sums = scores_of(small=small, large=large).sums({"small": "row", "large": "row"})
    assert sums["small"].item() == 5 * small[0, 0].item()
    assert sums["large"].item() == 5 * large[0, 0].item()


def test_keys_fall_as_values_rise() -> None:
    values = torch.tensor(ODD_NUMBERS)
    order = torch.argsort(values, descending=True, stable=True)
    assert torch.equal(torch.argsort(falling_keys(values), stable=True), order)
    assert falling_keys(torch.tensor([0.0])) == falling_keys(torch.tensor([-0.0]))


def test_a_vectors_entries_are_rows_of_one_column() -> None:
    part = Part(shape=(5,), start=2, length=3)
    assert segments_of(part, "row").tolist() == [2, 3, 4]
    assert segments_of(part, "column").tolist() == [0, 0, 0]


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_on_one_rank_is_refused_by_all(ranks: Ranks, bad: float, world: int) -> None:
    wanted = "importance scores of second hold NaN or infinity"
    assert ranks(world, "tests.work.scores:refused", bad=bad) == [[wanted, wanted]] * world


@pytest.mark.parametrize(("by", "size"), [("row", 3), ("column", 2), ("tensor", 6)])
def test_a_k_that_no_segment_has_is_refused(by: By, size: int) -> None:
    values = torch.zeros(2, 3)
    scores: list[Scores] = [scores_of(w=values), WholeScores({"w": values})]
    for score in scores:
        for k in (0, size + 1):
            with pytest.raises(ValueError, match=rf"w: k must be in \[1, {size}\], got {k}"):
                score.top_k({"w": k}, {"w": by})


def test_a_score_is_computed_for_what_a_call_names_only() -> None:
    asked: list[str] = []

    def score(name: str) -> torch.Tensor:
        asked.append(name)
        return torch.ones(4)

    parts = {name: Part((2, 2), 0, 4) for name in ("a", "b")}
    scores = ShardScores(
        slices=parts,
        score=score,
        live_mask=lambda name: torch.ones(4).bool(),
        site_stats=torch.zeros(0),
    )
    scores.top_k({"b": 1}, {"a": "row", "b": "row"})
    scores.sums({"b": "row"})
    assert set(asked) == {"b"}
    asked.clear()
    scores.spread("a", torch.ones(2), "row")
    assert (scores.top_k({}, {}), scores.sums({}), scores.live({}), asked) == ({}, {}, {}, [])


def test_collectives_are_as_many_for_a_hundred_tensors_as_for_one(ranks: Ranks) -> None:
    for tensors in (1, 100):
        for cost in ranks(2, "tests.work.scores:costs", rows=4, columns=20, tensors=tensors):
            calls = {name: cost[name]["calls"] for name in cost}
            assert calls == {
                "top_k": 6,
                "top_k with all ties": 5,
                "sums": 2,
                "live": 1,
                "gather": 1,
            }


@pytest.mark.parametrize("world", [2, 4])
def test_a_call_costs_counts_not_scores(ranks: Ranks, world: int) -> None:
    """2 tensors of 8 rows of 65,536: what the module's docstring says, to the byte."""
    tensors, rows = 2, 8
    segments = tensors * rows
    for cost in ranks(world, "tests.work.scores:costs", rows=rows, columns=65536, tensors=tensors):
        spent = {name: cost[name]["bytes"] for name in cost}
        assert spent == {
            "top_k": 8 * tensors + 8192 * segments + 4 * segments * (world - 1),
            "top_k with all ties": 8 * tensors + 8192 * segments,
            "sums": 8 * tensors + 16 * segments,
            "live": 16 * segments,
            "gather": rows * 65536 * 4 * (world - 1) // world,  # one tensor
        }
        assert spent["top_k"] < tensors * spent["gather"] / 15
