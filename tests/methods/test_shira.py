"""SHiRA: as many entries as were asked for train, at places that stay, with their own gradient."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from sparse_lora_dist.methods import shira as module
from sparse_lora_dist.methods.protocol.form import Form, Site
from sparse_lora_dist.methods.protocol.method import RunContext
from sparse_lora_dist.methods.protocol.rewriting import Rewritten, Whole
from sparse_lora_dist.methods.shared.top_k import k_largest
from sparse_lora_dist.methods.shira import ShiraOptions, SparseProduct, scattered, shira

SITE = Site(name="q", in_features=40, out_features=28, rank=3)
CPU = torch.device("cpu")


def form_of(site: Site = SITE, density: float | None = None) -> Form:
    context = RunContext(total_steps=10, warmup_steps=0, learning_rate=1e-3, sites=(site,))
    return shira(ShiraOptions(shira_density=density), context).form(site)


def test_only_the_chosen_entries_change() -> None:
    form = form_of()
    drawn = form.drawn(7, CPU)
    values_N = torch.randn(form.tensors["shira_values"].shape)
    change_OI = form.delta(torch.eye(40), drawn | {"shira_values": values_N}, 1.0).t()
    places_N = drawn["shira_places"]
    assert torch.equal(change_OI.flatten()[places_N], values_N)
    assert int(change_OI.count_nonzero()) == len(values_N) == 3 * (28 + 40)
    assert torch.equal(places_N, form.drawn(7, CPU)["shira_places"])
    assert not torch.equal(places_N, form.drawn(8, CPU)["shira_places"])
    # Everywhere: rows and columns alike have some.
    assert change_OI.any(0).all() and change_OI.any(1).all()


@pytest.mark.parametrize("chunk", [2**24, 50])
def test_the_gradient_is_that_of_the_whole_weight_at_the_places(
    chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHUNK", chunk)
    form = form_of()
    tensors = form.drawn(7, CPU)
    values_N = torch.randn(form.tensors["shira_values"].shape, dtype=torch.float64)
    x = torch.randn(2, 5, 40, dtype=torch.float64)
    weight_OI = torch.zeros(28 * 40, dtype=torch.float64)
    weight_OI[tensors["shira_places"]] = values_N
    weight_OI = weight_OI.view(28, 40).requires_grad_()
    for leaf in (values_N, x):
        leaf.requires_grad_()
    y, wanted = form.delta(x, tensors | {"shira_values": values_N}, 1.0), x @ weight_OI.t()
    torch.testing.assert_close(y, wanted)
    above = torch.randn_like(y)
    ours = torch.autograd.grad(y, [x, values_N], above)
    theirs = torch.autograd.grad(wanted, [x, weight_OI], above)
    torch.testing.assert_close(ours[0], theirs[0])
    torch.testing.assert_close(ours[1], theirs[1].flatten()[tensors["shira_places"]])


def test_of_a_product_only_the_first_values_have_a_gradient_if_told() -> None:
    places_N = torch.randperm(28 * 40)[:9]
    values_N, x, above = torch.randn(9, requires_grad=True), torch.randn(5, 40), torch.randn(5, 28)
    got, whole = [], []
    for told, grads in (((4,), got), ((), whole)):
        y = SparseProduct.apply(x, values_N, places_N, 28, *told)
        torch.testing.assert_close(y, x @ scattered(values_N.detach(), places_N, 28, 40).t())
        grads.append(torch.autograd.grad(y, values_N, above)[0])
    torch.testing.assert_close(got[0][:4], whole[0][:4])
    assert not got[0][4:].any() and whole[0].all()


@pytest.mark.parametrize(
    ("out", "wide", "count"),
    [(768, 768, 5898), (3072, 768, 23592), (4096, 4096, 167772), (11008, 4096, 450887)],
)
def test_parameters_are_a_share_of_the_weight_or_those_of_lora(
    out: int, wide: int, count: int
) -> None:
    site = Site(name="q", in_features=wide, out_features=out, rank=8)
    assert form_of(site, 0.01).tensors["shira_values"].shape == (count,)
    assert form_of(site).tensors["shira_values"].shape == (8 * (out + wide),)


def test_wrong_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="shira_density must be in"):
        ShiraOptions(shira_density=1.5)
    small = Site(name="k", in_features=10, out_features=10, rank=6)
    with pytest.raises(ValueError, match="k is 10 x 10. --rank 6 makes 120 .* Take --rank 5"):
        form_of(small)


def whole(support: str, step: int, *, settled: bool = False, **shown: Any) -> Rewritten:
    """What the method makes of a site that trained a step; NF4 gives many equal weights."""
    method = shira(ShiraOptions(shira_support=support, shira_calibration_steps=2), PLAN)  # type: ignore[arg-type]
    form = method.form(SITE)
    assert method.rewriting is not None and method.rewriting.at(step)
    kept = {k: torch.zeros(spec.shape, dtype=spec.dtype) for k, spec in form.kept.items()}
    kept |= {"shira_settled": torch.ones(1, dtype=torch.uint8)} if settled else {}
    count = form.tensors["shira_values"].shape
    return method.rewriting.write(
        Whole(
            site=SITE,
            index=0,
            step=step,
            tensors=kept | {"shira_values": torch.ones(count)},
            scale=1.0,
            weight_OI=lambda: WEIGHT_OI,
            generator=torch.Generator(),
            **shown,
        )
    )


PLAN = RunContext(total_steps=10, warmup_steps=0, learning_rate=1e-3, sites=(SITE,))
WEIGHT_OI = torch.randint(-4, 5, (28, 40), generator=torch.Generator().manual_seed(3)) / 8.0
GRADIENT_OI = torch.randn(28, 40, generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize(
    ("support", "score_OI"),
    [
        ("magnitude", WEIGHT_OI.abs()),
        ("gradient", GRADIENT_OI.abs()),
        ("snip", (WEIGHT_OI * GRADIENT_OI).abs()),
    ],
)
def test_the_places_of_largest_score_train(support: str, score_OI: torch.Tensor) -> None:
    by_gradient = {} if support == "magnitude" else {"gradient_OI": GRADIENT_OI}
    made = whole(support, 0 if support == "magnitude" else 1, **by_gradient).tensors
    order = sorted(range(28 * 40), key=lambda place: (-float(score_OI.flatten()[place]), place))
    assert made["shira_places"].tolist() == sorted(order[: 3 * 68])
    assert made["shira_places"].dtype == torch.int32
    assert not made["shira_values"].any(), "what was trained elsewhere is forgotten"


def test_a_schedule_that_begins_anew_chooses_and_forgets_nothing() -> None:
    assert not whole("snip", 1, settled=True, gradient_OI=GRADIENT_OI).tensors


def test_a_linear_whose_turn_has_not_come_only_forgets() -> None:
    assert list(whole("snip", 1).tensors) == ["shira_values"]
    assert sorted(whole("snip", 2).tensors) == ["shira_settled", "shira_values"]
    method = shira(ShiraOptions(shira_support="snip", shira_calibration_steps=2), PLAN)
    collects = method.rewriting.collects_gradient  # type: ignore[union-attr]
    assert [[collects(step, i) for i in range(4)] for step in (1, 2, 3)] == [  # type: ignore[misc]
        [True, False, True, False],
        [False, True, False, True],
        [False, False, False, False],
    ]


@pytest.mark.parametrize("support", ["rows", "columns"])
@pytest.mark.parametrize(("out", "inner"), [(28, 40), (40, 28), (30, 30)])
def test_rows_and_columns_come_with_the_diagonal(support: str, out: int, inner: int) -> None:
    site = Site(name="q", in_features=inner, out_features=out, rank=3)
    options = ShiraOptions(shira_support=support)  # type: ignore[arg-type]
    form = shira(options, replace(PLAN, sites=(site,))).form(site)
    places_N = form.drawn(7, CPU)["shira_places"]
    assert form.tensors["shira_values"].shape == places_N.shape
    assert len(places_N.unique()) == len(places_N) <= 3 * (out + inner)
    mask_OI = torch.zeros(out * inner).index_fill_(0, places_N, 1.0).view(out, inner)
    assert mask_OI.diagonal().all()
    lines = mask_OI if support == "rows" else mask_OI.t()
    full = lines.all(dim=1)
    assert int(full.sum()) == (3 * (out + inner) - min(out, inner)) // lines.shape[1] > 0
    assert int(lines[~full].sum(dim=1).max()) == 1, "nothing but the diagonal beside them"


def test_the_support_must_fit_the_run() -> None:
    with pytest.raises(ValueError, match="at least one must follow calibration"):
        shira(ShiraOptions(shira_support="snip", shira_calibration_steps=10), PLAN)
    with pytest.raises(ValueError, match="diagonal, which has 28. Take --shira_density 0.025"):
        shira(ShiraOptions(shira_support="rows", shira_density=0.01), PLAN)
    with pytest.raises(ValueError, match="density must be in.*; --shira_calibration_steps must be"):
        ShiraOptions(shira_density=2.0, shira_calibration_steps=0)


def test_equal_scores_go_by_their_place_and_nan_is_refused() -> None:
    scores = torch.tensor([[1.0, 2.0, 2.0], [2.0, 0.0, 3.0]])
    assert k_largest(scores, 3).tolist() == [[False, True, True], [False, False, True]]
    assert k_largest(scores, 6).all() and not k_largest(scores, 0).any()
    with pytest.raises(FloatingPointError, match="NaN"):
        k_largest(torch.tensor([1.0, torch.nan]), 1)


def test_counts_at_rank_8_and_at_one_percent() -> None:
    for out, inner, count, share in (
        (768, 768, 12_288, 5_898),
        (3072, 768, 30_720, 23_592),
        (4096, 4096, 65_536, 167_772),
        (11008, 4096, 120_832, 450_887),
    ):
        site = Site(name="q", in_features=inner, out_features=out, rank=8)
        assert form_of(site).tensors["shira_values"].shape == (count,)
        assert form_of(site, 0.01).tensors["shira_values"].shape in ((share,), (share + 1,))
