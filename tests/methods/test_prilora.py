"""PRILoRA: ranks rise with depth and keep their mean, each row of A loses what matters least."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from sparse_lora_dist.methods.prilora import PriLoraOptions, layer_of, prilora, ramp
from sparse_lora_dist.methods.protocol.form import Site, low_rank
from sparse_lora_dist.methods.protocol.method import Method, RunContext
from sparse_lora_dist.methods.protocol.rewriting import Rewritten, Whole

WIDE = 40


def sites_of(layers: int, rank: int = 8, out: int = 32, wide: int = WIDE) -> tuple[Site, ...]:
    """Two in each layer."""
    return tuple(
        Site(name=f"model.layers.{i}.{name}", in_features=wide, out_features=out, rank=rank)
        for i in range(layers)
        for name in ("self_attn.q_proj", "mlp.experts.7.up_proj")
    )


def build(sites: tuple[Site, ...], steps: int = 200, **options: Any) -> Method:
    context = RunContext(total_steps=steps, warmup_steps=0, learning_rate=1e-3, sites=sites)
    named = {f"prilora_{name}": value for name, value in options.items()}
    return prilora(PriLoraOptions(**named), context)


def ranks_of(method: Method, sites: tuple[Site, ...]) -> list[int]:
    """From what is trained, A and B alike."""
    ranks = []
    for site in sites:
        shapes = {name: spec.shape for name, spec in method.form(site).tensors.items()}
        rank = shapes["lora_a"][0]
        assert shapes == {
            "lora_a": (rank, site.in_features),
            "lora_b": (site.out_features, rank),
        }
        ranks.append(rank)
    return ranks


@pytest.mark.parametrize("layers", [2, 3, 7, 12, 32, 80])
@pytest.mark.parametrize("mean", [1, 2, 5, 8])
def test_ranks_rise_by_a_line_and_add_up_to_the_mean_in_every_layer(mean: int, layers: int) -> None:
    for first in range(1, 2 * mean):
        ranks = ramp(first, mean, layers)
        assert sum(ranks) == mean * layers
        assert (ranks[0], ranks[-1]) == (first, 2 * mean - first)
        assert ranks == sorted(ranks, reverse=first > mean)
        slope = 2 * (mean - first) / (layers - 1)
        assert all(abs(r - first - slope * i) < 1.0 for i, r in enumerate(ranks))


def test_the_papers_ramp() -> None:
    assert ramp(4, 8, 12) == [4, 5, 5, 6, 7, 8, 8, 9, 10, 11, 11, 12]


def test_all_linears_of_a_layer_have_its_rank() -> None:
    sites = sites_of(3)
    assert ranks_of(build(sites), sites) == [4, 4, 8, 8, 12, 12]
    assert ranks_of(build(sites, first=8), sites) == [8] * 6
    assert ranks_of(build(sites, first=1), sites) == [1, 1, 8, 8, 15, 15]


def test_depth_is_the_first_number_or_the_order_of_the_linears() -> None:
    site = sites_of(1)[0]
    names = ["encoder.layer.11.output.3.dense", "h.0.attn", "5", "q", "lm_head", "conv2d.proj"]
    layers = [layer_of(replace(site, name=name)) for name in names]
    assert layers == ["11", "0", "5", "q", "lm_head", "conv2d.proj"]
    # A model of which layers 4, 9 and 10 are adapted, and its output.
    named = tuple(replace(site, name=n) for n in ("h.4.q", "h.4.k", "h.9.q", "h.10.q", "lm_head"))
    assert ranks_of(build(named, first=2), named) == [2, 2, 6, 10, 14]
    plain = tuple(replace(site, name=n) for n in ("q", "k", "up"))
    assert ranks_of(build(plain), plain) == [4, 8, 12]


def test_a_single_layer_has_the_mean_and_so_has_a_linear_that_the_plan_does_not_know() -> None:
    sites = sites_of(1)
    assert ranks_of(build(sites), sites) == [8, 8]
    unknown = (replace(sites[0], name="model.layers.5.q"),)
    assert ranks_of(build(sites_of(3)), unknown) == [8]


def test_the_default_is_the_nearest_that_the_linears_have_room_for() -> None:
    sites = sites_of(3, out=10)
    assert ranks_of(build(sites), sites) == [6, 6, 8, 8, 10, 10]


@pytest.mark.parametrize(("out", "wide"), [(768, 768), (3072, 768), (4096, 4096), (11008, 4096)])
def test_parameters_are_those_of_lora_of_the_mean_rank(out: int, wide: int) -> None:
    sites = sites_of(12, out=out, wide=wide)
    method = build(sites)
    shapes = [spec.shape for site in sites for spec in method.form(site).tensors.values()]
    assert sum(torch.Size(shape).numel() for shape in shapes) == len(sites) * 8 * (out + wide)


def test_a_component_counts_the_same_in_every_layer() -> None:
    sites, x = sites_of(3), torch.randn(5, WIDE).double()
    method, alpha = build(sites), 16.0
    for site in sites:
        form = method.form(site)
        tensors = {name: torch.randn(spec.shape).double() for name, spec in form.tensors.items()}
        assert all(spec.component_axis is None for spec in form.tensors.values())
        rank = len(tensors["lora_a"])
        scale = form.scale(alpha, site.rank, site.rank)
        change_OI = alpha / 8 * tensors["lora_b"] @ tensors["lora_a"]
        torch.testing.assert_close(form.delta(x, tensors, scale), x @ change_OI.t())
        a_RI, b_OR = form.to_lora(tensors)
        assert a_RI.shape[0] == b_OR.shape[1] == rank
        torch.testing.assert_close(scale * b_OR @ a_RI, change_OI)


def test_a_flat_ramp_is_lora_to_the_bit() -> None:
    site = sites_of(2)[0]
    method = build(sites_of(2), first=8, sparsity=0.0)
    assert method.rewriting is None
    ours, theirs = method.form(site), low_rank(site)
    first = {}
    for form in (ours, theirs):
        for name, spec in form.tensors.items():
            t = torch.full(spec.shape, torch.nan)
            spec.init(t, torch.Generator().manual_seed(3))
            assert torch.equal(first.setdefault(name, t), t)
    assert ours.delta is theirs.delta and ours.scale(16.0, 8, 8) == theirs.scale(16.0, 8, 8)


# --- pruning ------------------------------------------------------------------------------------


def written(a_RI: Tensor, squares_I: Tensor | None, **options: Any) -> Rewritten:
    sites = sites_of(3)
    rewriting = build(sites, **options).rewriting
    assert rewriting is not None
    whole = Whole(
        site=sites[0],
        index=0,
        step=40,
        tensors={"lora_a": a_RI, "lora_b": torch.ones(32, len(a_RI))},
        scale=2.0,
        weight_OI=lambda: pytest.fail("it has no need of the weight"),
        generator=torch.Generator(),
        squares_I=squares_I,
    )
    return rewriting.write(whole)


@pytest.mark.parametrize(
    ("sparsity", "pruned"), [(0.5, 20), (0.25, 10), (0.51, 20), (0.99, 39), (0.01, 0)]
)
def test_each_row_loses_the_share_of_least_weight_times_norm(sparsity: float, pruned: int) -> None:
    torch.manual_seed(1)
    a_RI, squares_I = torch.randn(4, WIDE), torch.rand(WIDE, dtype=torch.float64) ** 4
    # A row of small entries keeps as many as a row of large ones.
    a_RI[2] *= 1e-3
    done = written(a_RI.clone(), squares_I, sparsity=sparsity)
    assert done.tensors.keys() == {"lora_a"}
    wanted_RI = a_RI.clone()
    for row, weight_I in enumerate(a_RI.tolist()):
        norms = squares_I.sqrt().tolist()
        order = sorted(range(WIDE), key=lambda i: abs(weight_I[i]) * norms[i])
        wanted_RI[row, order[:pruned]] = 0.0
    assert torch.equal(done.tensors["lora_a"], wanted_RI)
    assert ((wanted_RI == 0.0).sum(dim=1) == pruned).all()
    assert done.log_values == {"zeros_in_a": (4 * pruned, 4 * WIDE)}


def test_a_small_weight_of_a_large_input_survives_a_large_weight_of_a_small_one() -> None:
    a_RI = torch.ones(1, WIDE)
    a_RI[0, 0], a_RI[0, 1] = 0.01, 5.0
    squares_I = torch.ones(WIDE, dtype=torch.float64)
    squares_I[0], squares_I[1] = 1e6, 1e-4
    kept = written(a_RI, squares_I).tensors["lora_a"] != 0.0
    assert kept[0, 0] and not kept[0, 1]
    # Of the same weights alone the other one would.
    kept = written(a_RI, None).tensors["lora_a"] != 0.0
    assert kept[0, 1] and not kept[0, 0]


def test_equal_importance_keeps_the_lowest_index() -> None:
    kept = written(torch.ones(2, WIDE), torch.ones(WIDE, dtype=torch.float64)).tensors["lora_a"]
    assert kept[:, : WIDE // 2].all() and not kept[:, WIDE // 2 :].any()


def test_what_was_zeroed_has_a_gradient_and_may_stay_the_next_time() -> None:
    torch.manual_seed(2)
    form = build(sites_of(3)).form(sites_of(3)[0])
    squares_I = torch.ones(WIDE, dtype=torch.float64)
    a_RI = written(torch.randn(4, WIDE), squares_I).tensors["lora_a"].clone().requires_grad_()
    zero_RI = a_RI == 0.0
    y = form.delta(torch.randn(9, WIDE), {"lora_a": a_RI, "lora_b": torch.randn(32, 4)}, 1.0)
    (grad_RI,) = torch.autograd.grad(y.square().sum() + y.sum(), [a_RI])
    assert (grad_RI[zero_RI] != 0.0).all()
    stepped_RI = a_RI.detach() - 100.0 * grad_RI
    again_RI = written(stepped_RI, squares_I).tensors["lora_a"]
    returned_RI = zero_RI & (again_RI != 0.0)
    assert returned_RI.any()
    assert torch.equal(again_RI[returned_RI], stepped_RI[returned_RI])


@pytest.mark.parametrize(
    ("steps", "options", "at"),
    [
        (130, {"every": 40}, [40, 80, 120]),
        (200, {}, [40, 80, 120, 160, 200]),
        (30, {}, [7, 14, 21, 28]),
        (2, {}, [1, 2]),
        (100, {"every": 30, "start": 35}, [65, 95]),
        (41, {"start": 40}, [41]),
    ],
)
def test_it_prunes_every_so_many_steps(steps: int, options: dict[str, int], at: list[int]) -> None:
    rewriting = build(sites_of(3), steps, **options, decay=0.7).rewriting
    assert rewriting is not None
    assert [step for step in range(steps + 1) if rewriting.at(step)] == at
    assert rewriting.squares_decay == 0.7
    assert not rewriting.reads_weight and not rewriting.resets_moments


# --- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "out", "first", "nearest"),
    [(3, 32, 16, 15), (3, 32, 20, 15), (1, 32, 4, 8), (3, 10, 2, 6), (3, 10, 14, 10)],
)
def test_a_ramp_that_cannot_be_is_refused_with_the_nearest_that_works(
    layers: int, out: int, first: int, nearest: int
) -> None:
    sites = sites_of(layers, out=out)
    with pytest.raises(ValueError, match=f"prilora_first is {first}. .* works is {nearest}$"):
        build(sites, first=first)
    assert ranks_of(build(sites, first=nearest), sites)[0] == nearest


def test_a_run_that_ends_before_the_first_pruning_is_refused() -> None:
    with pytest.raises(ValueError, match=r"at step 50, but the run has 49. Take at most 49 for"):
        build(sites_of(3), 49, start=10, every=40)
    assert build(sites_of(3), 50, start=10, every=40).rewriting is not None
    assert build(sites_of(3), 49, start=10, every=40, sparsity=0.0).rewriting is None
    with pytest.raises(ValueError, match="prilora_start 60"):
        build(sites_of(3), 50, start=60)


def test_wrong_options_are_refused_all_at_once() -> None:
    with pytest.raises(ValueError, match="prilora_first") as caught:
        PriLoraOptions(
            prilora_first=0,
            prilora_sparsity=1.0,
            prilora_every=0,
            prilora_start=-1,
            prilora_decay=-0.1,
        )
    assert str(caught.value).split("; ") == [
        "--prilora_first must be at least 1, got 0",
        "--prilora_every must be at least 1, got 0",
        "--prilora_start must be at least 0, got -1",
        "--prilora_sparsity must be in [0, 1), got 1.0",
        "--prilora_decay must be in [0, 1), got -0.1",
    ]
