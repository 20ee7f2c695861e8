"""LoSA: what is pruned is exactly zero in the merged weight, and components go where pruning
costs."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from sparse_lora_dist.adapter.dropout import RowSeeds
from sparse_lora_dist.adapter.linear import AdapterLinear
from sparse_lora_dist.base_model.frozen_linear import FrozenLinear
from sparse_lora_dist.export.weight_change import dense_change
from sparse_lora_dist.methods.losa import (
    LosaOptions,
    gram,
    losa,
    lowest,
    ranks,
    rounds_of,
    similarity,
    sparsities,
)
from sparse_lora_dist.methods.protocol.form import WEIGHT, Site
from sparse_lora_dist.methods.protocol.method import Components, Method, RunContext
from sparse_lora_dist.methods.protocol.rewriting import Rewriting, Rewritten, Whole
from sparse_lora_dist.methods.shared.bit_masks import pack, unpack

WIDTHS = {"q": (12, 20), "k": (7, 20), "up": (30, 20), "down": (20, 31)}
"""Out and in features; those of k fill no whole bytes."""


def plan_of(rank: int = 6, steps: int = 100) -> RunContext:
    sites = tuple(
        Site(name=n, in_features=i, out_features=o, rank=rank) for n, (o, i) in WIDTHS.items()
    )
    return RunContext(total_steps=steps, warmup_steps=0, learning_rate=1e-3, sites=sites)


def method_of(context: RunContext, **options: float | int | None) -> Method:
    return losa(LosaOptions(**options), context)  # type: ignore[arg-type]


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def whole_of(site: Site, index: int, step: int, opened: int) -> Whole:
    """As if ``opened`` components were trained."""
    w_OI = random(site.out_features, site.in_features, seed=index)
    b_OR = random(site.out_features, site.rank, seed=index + 20)
    b_OR[:, opened:] = 0.0
    tensors = {"lora_a": random(site.rank, site.in_features, seed=index + 10), "lora_b": b_OR}
    return Whole(
        site=site,
        index=index,
        step=step,
        tensors=tensors | {"losa_pruned": torch.zeros(-(-w_OI.numel() // 8), dtype=torch.uint8)},
        scale=0.5,
        weight_OI=w_OI.clone,
        generator=torch.Generator(),
        # What goes in at q and k is the same.
        squares_I=random(site.in_features, seed=max(index, 1) + 30).square().double(),
        rows_NI=random(9, site.in_features, seed=max(index, 1) + 40),
    )


def rewriting_of(method: Method) -> Rewriting:
    assert method.rewriting is not None
    return method.rewriting


def written(method: Method, wholes: list[Whole]) -> list[Rewritten]:
    """What a round makes of all sites."""
    rewriting = rewriting_of(method)
    assert rewriting.measure is not None
    measures_SK = torch.stack([rewriting.measure(whole) for whole in wholes])
    assert measures_SK.dtype == torch.float64
    return [rewriting.write(replace(whole, measures_SK=measures_SK)) for whole in wholes]


def naive_mask(whole: Whole, count: int) -> Tensor:
    merged_OI = whole.weight_OI() + 0.5 * whole.tensors["lora_b"] @ whole.tensors["lora_a"]
    assert whole.squares_I is not None
    mask_OI = torch.zeros_like(merged_OI, dtype=torch.bool)
    for o, row in enumerate(merged_OI.tolist()):
        scores = [abs(w) * float(s) ** 0.5 for w, s in zip(row, whole.squares_I, strict=True)]
        for i in sorted(range(len(scores)), key=lambda i: scores[i])[:count]:
            mask_OI[o, i] = True
    return mask_OI


def test_the_delta_is_that_of_the_formula_and_so_are_its_gradients() -> None:
    site = plan_of().sites[1]
    form = method_of(plan_of()).form(site)
    w_OI, keep_OI = random(7, 20, seed=1).double(), random(7, 20, seed=2) > 0
    a_RI, b_OR = (random(*form.tensors[k].shape, seed=3).double() for k in ("lora_a", "lora_b"))
    x_TI = random(2, 5, 20, seed=4).double()
    for leaf in (a_RI, b_OR, x_TI):
        leaf.requires_grad_()
    kept = {"losa_pruned": pack(~keep_OI), WEIGHT: w_OI}
    y = form.delta(x_TI, kept | {"lora_a": a_RI, "lora_b": b_OR}, 0.5)
    wanted = x_TI @ (keep_OI * (w_OI + 0.5 * b_OR @ a_RI) - w_OI).t()
    torch.testing.assert_close(y, wanted)
    above = random(*y.shape, seed=5).double()
    ours = torch.autograd.grad(y, [a_RI, b_OR, x_TI], above)
    theirs = torch.autograd.grad(wanted, [a_RI, b_OR, x_TI], above)
    torch.testing.assert_close(ours, theirs)


def test_what_is_pruned_is_exactly_zero_in_the_merged_weight_and_nothing_else() -> None:
    method, site = method_of(plan_of()), plan_of().sites[1]
    w_OI, pruned_OI = random(7, 20, seed=1).bfloat16().float(), random(7, 20, seed=2) > 0
    parameters = {k: random(*s.shape, seed=3) for k, s in method.form(site).tensors.items()}
    frozen = [nn.Parameter(t, requires_grad=False) for t in (w_OI, pack(pruned_OI))]
    layer = AdapterLinear(
        FrozenLinear(20, 7, frozen[0], None),
        site,
        method,
        {k: nn.Parameter(t) for k, t in parameters.items()} | {"losa_pruned": frozen[1]},
        alpha=12.0,
        dropout=0.0,
        row_seeds=RowSeeds(seed=0, sequence_length=8),
    )
    for computed in (6, 2):
        layer.set_components(Components(computed=tuple(range(computed)), open=computed))
        with torch.no_grad():
            tensors = layer.computed([layer.lora_a, layer.lora_b])
            merged_OI = w_OI + dense_change(layer, tensors).change_OI
        assert torch.equal(merged_OI == 0, pruned_OI)
        update_OI = parameters["lora_b"][:, :computed] @ parameters["lora_a"][:computed]
        # alpha / R whatever is open, and whatever R: the release has alpha / 8.
        torch.testing.assert_close(merged_OI, ~pruned_OI * (w_OI + 12 / 6 * update_OI))


def test_rounds_are_equally_spaced_and_their_sparsity_cubic() -> None:
    context = plan_of(rank=16)
    rounds = rounds_of(LosaOptions(losa_sparsity=0.6), context)
    assert list(rounds) == [1, 11, 21, 31, 41]
    cubic = [0.6 - 0.6 * (1 - t / 5) ** 3 for t in range(1, 6)]
    assert [r.sparsity for r in rounds.values()] == pytest.approx(cubic)
    assert rounds[41].sparsity == 0.6
    assert [r.mean_rank for r in rounds.values()] == [6, 7, 8, 9, 10]
    at = rewriting_of(losa(LosaOptions(), context)).at
    assert [step for step in range(101) if at(step)] == [0, *rounds]
    assert list(rounds_of(LosaOptions(losa_rounds=1), context)) == [1]
    # To the last step but one.
    late = LosaOptions(losa_until=0.99, losa_rounds=5)
    assert list(rounds_of(late, plan_of(steps=6))) == [1, 2, 3, 4, 5]
    low = rounds_of(LosaOptions(losa_mean_rank=2), context)
    assert [r.mean_rank for r in low.values()] == [1, 1, 1, 1, 2]


def test_the_lowest_of_each_row_go_and_of_equal_ones_the_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sparse_lora_dist.methods.losa.SORTED", 2)
    scores_OI = torch.tensor([[3.0, 1.0, 1.0, 1.0], [0.0, 2.0, 0.0, 1.0], [5.0, 5.0, 5.0, 5.0]])
    wanted = torch.tensor([[0, 1, 1, 0], [1, 0, 1, 0], [1, 1, 0, 0]]).bool()
    assert torch.equal(lowest(scores_OI, 0.5), wanted)
    assert torch.equal(lowest(scores_OI, 0.6), wanted)
    assert not lowest(scores_OI, 0.1).any()


@pytest.mark.parametrize("target", [0.0, 0.01, 0.244, 0.5, 0.99])
def test_sparsities_are_the_target_in_the_mean_over_weights(target: float) -> None:
    sizes_S = torch.tensor([100.0, 400.0, 50.0, 900.0, 900.0]).double()
    importance_S = torch.tensor([0.5, 0.9, 0.4, 0.7, 0.65]).double()
    found_S = sparsities(importance_S, sizes_S, target=target, spread=0.02)
    mean = float((found_S * sizes_S).sum() / sizes_S.sum())
    assert mean == pytest.approx(target, abs=1e-12)
    room = min(0.02, target, 1 - target)
    assert float((found_S - target).abs().max()) == pytest.approx(room, abs=1e-12)
    assert found_S.argsort().tolist() == importance_S.argsort(descending=True).tolist() or not room
    alike_S = sparsities(torch.full((5,), 0.7).double(), sizes_S, target=target, spread=0.02)
    assert alike_S.tolist() == pytest.approx([target] * 5, abs=1e-9)


def test_similarity_is_linear_cka_with_the_others() -> None:
    rows = [random(9, width, seed=width).double() for width in (20, 31, 40)]
    centred = [r - r.mean(0) for r in rows]

    def cka(x: Tensor, y: Tensor) -> float:
        return float((x.t() @ y).norm() ** 2 / (x.t() @ x).norm() / (y.t() @ y).norm())

    pairs = [[cka(x, y) for y in centred] for x in centred]
    wanted = [(sum(row) - row[i]) / 2 for i, row in enumerate(pairs)]
    found = similarity(torch.stack([gram(r.float()) for r in rows]))
    assert found.tolist() == pytest.approx(wanted, abs=1e-6)
    # Only so many rows count, and without any nothing is alike.
    many = random(40, 20, seed=1)
    assert torch.equal(gram(many), gram(many[:16]))
    assert similarity(torch.stack([gram(None), gram(rows[0])])).tolist() == [0.0, 0.0]
    assert similarity(gram(many)[None]).tolist() == [0.0]


def test_ranks_are_in_proportion_to_the_errors_and_sum_to_the_total() -> None:
    one, six = torch.ones(4).double(), torch.full((4,), 6.0).double()
    errors = torch.tensor([0.1, 0.2, 0.3, 0.4]).double()
    assert ranks(errors, one, six, 10).tolist() == [1, 2, 3, 4]
    # Of 1.2, 2.4, 3.6 and 4.8 the two largest remainders are rounded up.
    assert ranks(errors, one, six, 12).tolist() == [1, 2, 4, 5]
    # What one may not have, others get.
    big = torch.tensor([0.6, 0.01, 0.01, 30.0]).double()
    assert ranks(big, one, six, 14).tolist() == [6, 1, 1, 6]
    assert ranks(torch.zeros(4).double(), one, six, 10).sum() == 10
    assert ranks(errors, torch.tensor([5.0, 1, 1, 1]).double(), six, 12).tolist() == [5, 2, 2, 3]
    # As near as the bounds allow.
    assert ranks(errors, six, six, 10).tolist() == [6, 6, 6, 6]
    assert ranks(errors, one, six, 99).tolist() == [6, 6, 6, 6]


@pytest.mark.parametrize("seed", range(20))
def test_ranks_keep_total_and_bounds_whatever_the_errors(seed: int) -> None:
    numbers = torch.Generator().manual_seed(seed)
    errors = torch.rand(30, generator=numbers).double() ** (1 + seed)
    least = torch.randint(1, 4, (30,), generator=numbers).double()
    most = torch.full((30,), 16.0).double()
    found = ranks(errors, least, most, 30 * 6)
    assert found.sum() == 30 * 6
    assert (found >= least).all() and (found <= most).all()
    free = (found > least) & (found < most)
    shares = (found / errors)[free]
    slack = (1.0 / errors)[free]
    # Nobody has a component that another has more than a component's claim to.
    assert (shares - slack).max() <= (shares + slack).min() + 1e-9


def test_a_round_prunes_the_merged_weight_and_opens_components() -> None:
    context = plan_of()
    wholes = [whole_of(site, i, step=41, opened=2) for i, site in enumerate(context.sites)]
    done = written(method_of(context, losa_spread=0.1), wholes)
    # Recomputed with loops from what is written above: see naive_mask.
    errors, counts = [], []
    for whole, one in zip(wholes, done, strict=True):
        mask_OI = unpack(
            one.tensors["losa_pruned"], (whole.site.out_features, whole.site.in_features)
        )
        (count,) = mask_OI.sum(1).unique().tolist()
        assert torch.equal(mask_OI, naive_mask(whole, count))
        counts.append(count / whole.site.in_features)
        assert one.log_values["sparsity"] == (int(mask_OI.sum()), mask_OI.numel())
        assert whole.squares_I is not None
        merged_OI = whole.weight_OI() + 0.5 * whole.tensors["lora_b"] @ whole.tensors["lora_a"]
        energy_OI = merged_OI.square() * whole.squares_I
        half = naive_mask(whole, round(0.5 * whole.site.in_features))
        errors.append(float(energy_OI[half].sum() / energy_OI.sum()))
    # q and k have the same inputs, so they are more alike, less important and sparser.
    assert counts[0] == counts[1] > max(counts[2:]) and counts[0] <= 0.6
    sizes = [o * i for o, i in WIDTHS.values()]
    mean = sum(c * n for c, n in zip(counts, sizes, strict=True)) / sum(sizes)
    assert mean == pytest.approx(0.5, abs=1 / 40)
    by_error = ranks(
        torch.tensor(errors).double(), torch.full((4,), 2.0), torch.full((4,), 6.0), 16
    )
    assert [one.log_values["rank"] for one in done] == by_error.tolist()
    assert [one.computed for one in done] == [tuple(range(int(r))) for r in by_error]


def test_components_never_go_and_the_delta_moves_by_the_mask_alone() -> None:
    context = plan_of()
    method = method_of(context)
    wholes = [whole_of(s, i, step=41, opened=5 - i) for i, s in enumerate(context.sites)]
    for whole, one in zip(wholes, written(method, wholes), strict=True):
        opened = 5 - whole.index
        assert one.computed is not None and len(one.computed) >= opened
        assert set(one.tensors) == {"losa_pruned"}
        deltas = []
        for count in (opened, len(one.computed)):
            a_RI, b_OR = whole.tensors["lora_a"][:count], whole.tensors["lora_b"][:, :count]
            tensors = {"lora_a": a_RI, "lora_b": b_OR, WEIGHT: whole.weight_OI()} | one.tensors
            x_TI = torch.eye(whole.site.in_features)
            deltas.append(method.form(whole.site).delta(x_TI, tensors, 0.5))
        torch.testing.assert_close(deltas[0], deltas[1])


def test_pruned_weights_may_come_back() -> None:
    context = plan_of()
    (before, after) = (
        written(
            method_of(context),
            [whole_of(s, i, step, opened=o) for i, s in enumerate(context.sites)],
        )[0].tensors["losa_pruned"]
        for step, o in ((31, 1), (41, 3))
    )
    gone, now = (unpack(bits, (12, 20)) for bits in (before, after))
    assert (gone & ~now).any() and now.sum() >= gone.sum()


def test_more_than_eight_components_are_opened_and_computed() -> None:
    """The release has 8, and cuts what is above."""
    context = plan_of(rank=16)
    wholes = [whole_of(s, i, step=41, opened=1) for i, s in enumerate(context.sites)]
    done = written(method_of(context), wholes)
    assert sum(one.log_values["rank"] for one in done) == 4 * 10
    for whole, one in zip(wholes, done, strict=True):
        assert one.computed is not None and 8 < len(one.computed) <= 16
        a_RI = whole.tensors["lora_a"][: len(one.computed)]
        b_OR = torch.zeros(whole.site.out_features, len(one.computed))
        b_OR[:, -1] = 1.0
        tensors = {"lora_a": a_RI, "lora_b": b_OR, WEIGHT: whole.weight_OI()}
        tensors["losa_pruned"] = torch.zeros_like(one.tensors["losa_pruned"])
        change = method_of(context).form(whole.site).delta(torch.eye(a_RI.shape[1]), tensors, 1.0)
        torch.testing.assert_close(change, b_OR.new_ones(1, len(b_OR)) * a_RI[-1][:, None])


def test_before_the_first_step_one_component_is_open_or_those_that_are_given() -> None:
    context = plan_of()
    for opened, wanted in ((0, 1), (4, 4)):
        wholes = [whole_of(s, i, step=0, opened=opened) for i, s in enumerate(context.sites)]
        bare = [replace(whole, squares_I=None, rows_NI=None) for whole in wholes]
        for one in written(method_of(context), bare):
            assert one == Rewritten(computed=tuple(range(wanted)))


def test_without_statistics_the_magnitude_decides_and_linears_are_alike() -> None:
    """Such as after a first step that fp16 refused."""
    context = plan_of()
    wholes = [whole_of(s, i, step=41, opened=1) for i, s in enumerate(context.sites)]
    bare = [replace(whole, squares_I=None, rows_NI=None) for whole in wholes]
    for whole, one in zip(bare, written(method_of(context), bare), strict=True):
        site = whole.site
        even = replace(whole, squares_I=torch.ones(site.in_features))
        mask_OI = unpack(one.tensors["losa_pruned"], (site.out_features, site.in_features))
        assert torch.equal(mask_OI, naive_mask(even, round(0.5 * site.in_features)))


@pytest.mark.parametrize(
    ("out", "wide", "count"),
    [(768, 768, 12288), (3072, 768, 30720), (4096, 4096, 65536), (11008, 4096, 120832)],
)
def test_parameters_are_those_of_lora_and_the_mask_has_a_bit_a_weight(
    out: int, wide: int, count: int
) -> None:
    site = Site(name="q", in_features=wide, out_features=out, rank=8)
    form = method_of(plan_of()).form(site)
    assert sum(torch.Size(spec.shape).numel() for spec in form.tensors.values()) == count
    assert form.kept["losa_pruned"].num_bytes == out * wide // 8


def test_wrong_numbers_are_refused() -> None:
    with pytest.raises(ValueError) as raised:
        LosaOptions(
            losa_sparsity=1.0, losa_rounds=0, losa_until=1.0, losa_mean_rank=0, losa_spread=-0.1
        )
    assert str(raised.value) == (
        "--losa_sparsity must be in [0, 1), got 1.0; --losa_rounds must be at least 1, got 0; "
        "--losa_until must be in (0, 1), got 1.0; --losa_mean_rank must be at least 1, got 0; "
        "--losa_spread must be in [0, 1), got -0.1"
    )
    with pytest.raises(ValueError, match="run's 8 steps have room for 4. Take fewer rounds"):
        method_of(plan_of(steps=8))
    method_of(plan_of(steps=8), losa_rounds=4)
    with pytest.raises(ValueError, match="losa_mean_rank is 7, .* Take 6 or less, or raise --rank"):
        method_of(plan_of(), losa_mean_rank=7)
