"""MoRA: its update is the matrix that the paper's maps make, of as many parameters as LoRA has; and
what restarts merge stays in it.

Shapes: T tokens, I in_features, O out_features, H side of M, G groups.
"""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from sparse_lora_dist.methods.mora import MoraOptions, mora
from sparse_lora_dist.methods.protocol.form import Form, Site
from sparse_lora_dist.methods.protocol.method import Method, RunContext
from sparse_lora_dist.methods.protocol.rewriting import Whole

SITE = Site(name="q", in_features=24, out_features=36, rank=2)
SITES = [
    SITE,
    replace(SITE, out_features=17),
    replace(SITE, in_features=5, out_features=90),
    replace(SITE, in_features=90, out_features=31, rank=1),
]
PLAN = RunContext(total_steps=10, warmup_steps=0, learning_rate=1e-3, sites=(SITE,))
MERGED = "mora_contiguous", "mora_strided"


def built(kind: int, restarts: int = 0, context: RunContext = PLAN) -> Method:
    options = MoraOptions(mora_type=kind, mora_restarts=restarts)  # type: ignore[arg-type]
    return mora(options, context)


def form_of(site: Site, kind: int, restarts: int = 0) -> Form:
    return built(kind, restarts).form(site)


def dense(site: Site, form: Form, tensors: dict[str, Tensor]) -> Tensor:
    """What is added to the weight: the delta of the identity."""
    dtype = tensors["mora_m"].dtype
    return form.delta(torch.eye(site.in_features, dtype=dtype), tensors, 1.0).t()


def change(site: Site, kind: int, turn: int) -> tuple[Tensor, Tensor]:
    """M and what is added to the weight, while it acts through one of the groupings."""
    form = form_of(site, kind, restarts=turn)
    m_HH = torch.randn(form.tensors["mora_m"].shape, dtype=torch.float64)
    tensors = {"mora_m": m_HH} | {key: torch.zeros_like(m_HH) for key in MERGED}
    tensors["mora_turn"] = torch.tensor([turn], dtype=torch.uint8)
    return m_HH, dense(site, form, tensors)


@pytest.mark.parametrize("turn", [0, 1])
@pytest.mark.parametrize("site", SITES)
def test_type_1_shares_the_matrix_over_groups(site: Site, turn: int) -> None:
    m_HH, change_OI = change(site, 1, turn)
    side, wanted = len(m_HH), torch.zeros_like(change_OI)
    groups, results = (math.ceil(n / side) for n in (site.in_features, site.out_features))
    for o in range(site.out_features):
        for place in range(groups * side):
            row, column = (o // results, place // groups) if turn else (o % side, place % side)
            wanted[o, place % site.in_features] += m_HH[row, column]
    torch.testing.assert_close(change_OI, wanted)


@pytest.mark.parametrize("turn", [0, 1])
@pytest.mark.parametrize("site", SITES)
def test_type_6_turns_each_group_by_its_angle(site: Site, turn: int) -> None:
    m_HH, change_OI = change(site, 6, turn)
    side, groups = len(m_HH), math.ceil(site.in_features / len(m_HH))
    assert side % 2 == 0
    whole = torch.zeros(groups * side, site.in_features, dtype=torch.float64)
    for g in range(groups):
        rotation = torch.zeros(side, side, dtype=torch.float64)
        for j in range(side // 2):
            angle, k = g * 10000.0 ** (-2 * j / side), j + side // 2
            rotation[j, j] = rotation[k, k] = math.cos(angle)
            rotation[j, k], rotation[k, j] = -math.sin(angle), math.sin(angle)
        for h in range(side):
            column = (h * groups + g if turn else g * side + h) % site.in_features
            whole[g * side : (g + 1) * side, column] += (m_HH @ rotation)[:, h]
    wanted = whole[torch.arange(site.out_features) % len(whole)]
    if turn:
        results = math.ceil(site.out_features / side)
        rows = [o % results % groups * side + o // results for o in range(site.out_features)]
        wanted = whole[rows]
    torch.testing.assert_close(change_OI, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("out", "wide", "one", "six"),
    [(768, 768, 111, 110), (3072, 768, 175, 174), (4096, 4096, 256, 256), (11008, 4096, 348, 348)],
)
@pytest.mark.parametrize("restarts", [0, 3])
def test_parameters_are_a_square(out: int, wide: int, one: int, six: int, restarts: int) -> None:
    site = Site(name="q", in_features=wide, out_features=out, rank=8)
    for kind, side in ((1, one), (6, six)):
        form = form_of(site, kind, restarts)
        assert {key: spec.shape for key, spec in form.tensors.items()} == {"mora_m": (side, side)}
        kept = {key: spec.shape for key, spec in form.kept.items()}
        merged = {key: (side, side) for key in MERGED} | {"mora_turn": (1,)}
        assert kept == (merged if restarts else {})


def course(kind: int, restarts: int) -> list[tuple[Tensor, Tensor, dict[str, Tensor]]]:
    """Of every part of a run: M and the dense change at its end, and the tensors after it."""
    method, parts = built(kind, restarts), []
    form, generator = method.form(SITE), torch.Generator().manual_seed(0)
    tensors = {key: torch.zeros(spec.shape, dtype=spec.dtype) for key, spec in form.kept.items()}
    assert method.rewriting is not None
    for last in method.stages:
        m_HH = torch.randn(form.tensors["mora_m"].shape, generator=generator)
        tensors = tensors | {"mora_m": m_HH}
        before_OI = dense(SITE, form, tensors)
        if method.rewriting.at(last):
            whole = Whole(
                site=SITE,
                index=0,
                step=last,
                tensors=tensors,
                scale=1.0,
                weight_OI=lambda: torch.zeros(0),
                generator=torch.Generator(),
            )
            tensors = tensors | dict(method.rewriting.write(whole).tensors)
        parts.append((m_HH, before_OI, tensors))
    return parts


@pytest.mark.parametrize("kind", [1, 6])
def test_a_restart_leaves_the_delta_and_changes_the_grouping(kind: int) -> None:
    form = form_of(SITE, kind, 3)
    for i, (_, before_OI, tensors) in enumerate(course(kind, 3)[:-1]):
        assert not tensors["mora_m"].any() and int(tensors["mora_turn"]) == (i + 1) % 2
        torch.testing.assert_close(dense(SITE, form, tensors), before_OI)


@pytest.mark.parametrize("kind", [1, 6])
def test_every_grouping_has_the_sum_of_its_own(kind: int) -> None:
    squares, _, ends = zip(*course(kind, 4), strict=True)
    contiguous, strided = (ends[-1][key] for key in MERGED)
    torch.testing.assert_close(contiguous, squares[0] + squares[2])
    torch.testing.assert_close(strided, squares[1] + squares[3])


def test_ranks_of_type_1_add_up_to_twice_that_of_one_matrix() -> None:
    side = form_of(SITE, 1).tensors["mora_m"].shape[0]
    assert side == 11
    ranks = [int(torch.linalg.matrix_rank(change_OI)) for _, change_OI, _ in course(1, 3)]
    assert ranks[0] == side
    assert all(side + side // 2 < rank <= 2 * side for rank in ranks[1:])


@pytest.mark.parametrize("kind", [1, 6])
def test_before_the_first_restart_it_is_what_it_is_without(kind: int) -> None:
    _, with_restarts_OI, _ = course(kind, 2)[0]
    form = form_of(SITE, kind)
    m_HH = torch.randn(form.tensors["mora_m"].shape, generator=torch.Generator().manual_seed(0))
    assert torch.equal(dense(SITE, form, {"mora_m": m_HH}), with_restarts_OI)


def test_a_small_matrix_is_not_rounded_away_beside_large_merged_ones() -> None:
    form = form_of(SITE, 1, 1)
    ones_HH = torch.ones(form.tensors["mora_m"].shape, dtype=torch.bfloat16)
    m_HH = torch.zeros_like(ones_HH)
    m_HH[:, 0] = 2**-10
    tensors = {"mora_m": m_HH, "mora_turn": torch.zeros(1, dtype=torch.uint8)}
    x_TI = torch.zeros(1, 24, dtype=torch.bfloat16)
    x_TI[0, :2] = torch.tensor([1.0, -1.0])  # which rows of ones make nothing of
    y_TO = form.delta(x_TI, tensors | dict.fromkeys(MERGED, ones_HH), 1.0)
    assert torch.equal(y_TO, torch.full_like(y_TO, 2**-10))


def test_parts_are_equal_stages_that_each_begin_anew() -> None:
    method = built(6, 2)
    assert method.stages == (3, 6, 10) and method.stage_resets_moments and not method.redraws
    assert method.rewriting is not None
    assert [s for s in range(11) if method.rewriting.at(s)] == [3, 6]


def test_without_restarts_the_run_is_one() -> None:
    method = built(6)
    assert method.stages == () and method.rewriting is None and method.redraws


def test_restarts_that_do_not_fit_are_refused_with_how_many_do() -> None:
    with pytest.raises(ValueError, match="mora_restarts must be at least 0, got -1"):
        MoraOptions(mora_restarts=-1)
    with pytest.raises(ValueError, match="mora_restarts is 10,.* 11 st.* 10 steps .* most 10 st"):
        built(6, 10)
    built(6, 9)
    warm = replace(PLAN, warmup_steps=4)
    with pytest.raises(ValueError, match=r"mora_restarts is 2.*warmup_steps is 4\). At most 2 st"):
        built(6, 2, warm)
    built(6, 1, warm)
