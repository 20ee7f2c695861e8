"""The laws every method keeps, as pure functions; on real ranks: ``test_laws.py``.

A method costs three files: its own, its line in ``methods/__init__.py``, its row in ``laws.py``.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparse_lora_dist.adapter.dropout import RowSeeds
from sparse_lora_dist.adapter.linear import AdapterLinear
from sparse_lora_dist.base_model.frozen_linear import FrozenLinear
from sparse_lora_dist.export.peft_adapter import NoPair, plain_pair
from sparse_lora_dist.export.weight_change import dense_change
from sparse_lora_dist.methods import METHODS, Method, RunContext
from sparse_lora_dist.methods.protocol.form import Site, TensorSpec, Update
from sparse_lora_dist.methods.protocol.method import Components, Decision, Stats, trained_specs
from sparse_lora_dist.methods.protocol.rewriting import Rewriting, Rewritten, Whole
from tests.fixtures.whole_scores import WholeScores
from tests.laws import LAWS, Law

STEPS = 12


def test_every_method_has_a_row() -> None:
    assert set(METHODS) <= set(LAWS)


@pytest.fixture(params=LAWS.values(), ids=LAWS)
def law(request: pytest.FixtureRequest) -> Law:
    return request.param


@pytest.fixture
def method(law: Law) -> Method:
    return build(law.on, law)


def build(options: dict[str, Any], law: Law) -> Method:
    own = {name: value for name, value in options.items() if name != "target_modules"}
    context = RunContext(total_steps=STEPS, warmup_steps=0, learning_rate=1e-2, sites=law.sites)
    return law.factory.build(law.factory.options(**own), context)


def sites_of(method: Method) -> tuple[Site, ...]:
    return LAWS[method.name].sites


def random(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def specs(method: Method) -> dict[str, TensorSpec]:
    return trained_specs(method, sites_of(method))


def adapter(method: Method, values: dict[str, Tensor], *, written: bool = True) -> AdapterLinear:
    """The first site's, on a random base; what it keeps as the method has ``written`` it first."""
    site = sites_of(method)[0]
    weight = nn.Parameter(random(site.out_features, site.in_features, seed=5), requires_grad=False)
    trained = {k: nn.Parameter(values[f"{site.name}.{k}"]) for k in method.form(site).tensors}
    kept = {
        k: nn.Parameter(t, requires_grad=False)
        for k, t in kept_bytes(method, written=written).items()
    }
    return AdapterLinear(
        FrozenLinear(site.in_features, site.out_features, weight, None),
        site,
        method,
        trained | kept,
        alpha=12.0,
        dropout=0.0,
        row_seeds=RowSeeds(seed=0, sequence_length=8),
    )


def kept_bytes(method: Method, *, written: bool) -> dict[str, Tensor]:
    """What the first site keeps before the first step, or when the method has first written it."""
    site = sites_of(method)[0]
    form = method.form(site)
    kept = {k: torch.zeros(spec.shape, dtype=spec.dtype) for k, spec in form.kept.items()}
    if method.rewriting is not None and (written or method.rewriting.at(0)):
        shape = site.out_features, site.in_features
        whole = Whole(
            site=site,
            index=0,
            step=next(s for s in range(STEPS) if method.rewriting.at(s)),
            tensors=kept | {k: random(*spec.shape) for k, spec in form.tensors.items()},
            scale=2.0,
            weight_OI=lambda: random(*shape, seed=5),
            generator=torch.Generator().manual_seed(1),
            squares_I=random(site.in_features).square().double(),
            gradient_OI=random(*shape, seed=6),
            rows_NI=random(4, site.in_features),
        )
        if method.rewriting.measure is not None:
            measures = method.rewriting.measure(whole).double()
            whole = replace(whole, measures_SK=measures.repeat(len(sites_of(method)), 1))
        kept |= {k: t for k, t in method.rewriting.write(whole).tensors.items() if k in kept}
    return {k: t.contiguous().view(-1).view(torch.uint8) for k, t in kept.items()}


def first_values(method: Method) -> dict[str, Tensor]:
    values = {}
    for i, (name, spec) in enumerate(specs(method).items()):
        values[name] = torch.empty(spec.shape)
        spec.init(values[name], torch.Generator().manual_seed(i))
    return values


def trained_values(method: Method) -> dict[str, Tensor]:
    """As if trained; of gates and lambdas, the third has come to nothing."""
    values = {n: random(*spec.shape, seed=i) for i, (n, spec) in enumerate(specs(method).items())}
    for t in values.values():
        if t.dim() == 1:
            t[2] = 0.0
    return values


def first_decision(method: Method, values: dict[str, Tensor]) -> Decision:
    zeros = {name: torch.zeros_like(t) for name, t in values.items()}
    return method.decide(0, WholeScores(zeros)) if method.decides_at(0) else Decision()


def observed(method: Method, w: Tensor, grads: list[Tensor]) -> Stats:
    stats = tuple(torch.zeros_like(w) for _ in range(method.n_stats))
    for step, grad in enumerate(grads, start=1):
        stats = method.observe(stats, w, grad, step)
    return stats


def test_the_delta_is_nothing_at_first(law: Law) -> None:
    for options, largest in ((law.on, law.first_delta), (law.off, 0.0)):
        method = build(options, law)
        values = first_values(method)
        layer = adapter(method, values, written=False)
        layer.set_components(first_decision(method, values).components.get("q", layer.components))
        x = random(5, 24)
        delta = (layer(x) - layer.base(x)).abs().max()
        assert delta <= largest and bool(delta > 0.0) == (largest > 0.0)


def test_the_delta_is_that_of_what_is_exported(law: Law, method: Method) -> None:
    x, values = random(5, 24), trained_values(method)
    layer = adapter(method, values)
    has_components = all(spec.component_axis is not None for spec in layer.specs.values())
    for computed in (layer.components.computed, *[(0, 2, 3), ()][: 2 * has_components]):
        layer.set_components(type(layer.components)(computed=computed, open=len(computed)))
        tensors = [getattr(layer, name) for name in layer.specs]
        if not law.is_pair:
            change_OI = dense_change(layer, layer.computed(tensors)).change_OI
            wanted = layer.base(x) + x @ change_OI.t()
            torch.testing.assert_close(layer(x), wanted, rtol=1e-4, atol=1e-5)
            with pytest.raises(NoPair, match=f"--method {method.name} adds"):
                plain_pair(layer, tensors)
            continue
        a_RI, b_OR = plain_pair(layer, tensors)
        assert a_RI.shape[1:] == (24,) and b_OR.shape[:1] == (24,)
        assert not has_components or len(a_RI) == 6
        wanted = layer.base(x) + layer.alpha / 6 * x @ a_RI.t() @ b_OR.t()
        torch.testing.assert_close(layer(x), wanted, rtol=1e-4, atol=1e-5)


def test_observing_two_shards_is_observing_the_whole(method: Method) -> None:
    w, grads = random(101), [random(101, seed=s) for s in (2, 3)]
    whole = observed(method, w, grads)
    assert len(whole) == method.n_stats
    halves = [observed(method, w[c], [g[c] for g in grads]) for c in (slice(37), slice(37, 101))]
    for stat, first, second in zip(whole, *halves, strict=True):
        assert torch.equal(stat, torch.cat([first, second]))


def test_scoring_and_projecting_are_elementwise(method: Method) -> None:
    w, cuts = random(101), (slice(37), slice(37, 101))
    stats = observed(method, w, [random(101, seed=2)])
    if stats:
        parts = [method.score(tuple(s[c] for s in stats), w[c]) for c in cuts]
        assert torch.equal(method.score(stats, w), torch.cat(parts))
    denominator = random(101, seed=3).abs() + 0.1
    for spec in specs(method).values():
        if spec.project is not None:
            halves = [
                spec.project(w[c].clone(), Update(step=9, lr=0.1, denominator=denominator[c]))
                for c in cuts
            ]
            update = Update(step=9, lr=0.1, denominator=denominator)
            assert torch.equal(spec.project(w.clone(), update), torch.cat(halves))


def course(
    method: Method, order: Tensor | None = None, loss_scale: float = 1.0
) -> list[tuple[int, Decision]]:
    """Every decision of a run whose parameters and gradients are random numbers; ``order`` puts the
    components of every site in another one."""
    values = trained_values(method)
    tensors = specs(method)

    stats: dict[str, Stats] = {
        n: tuple(torch.zeros_like(t) for _ in range(method.n_stats)) for n, t in values.items()
    }
    num_sites = len(sites_of(method))
    site_stats = torch.zeros(method.n_site_stats, num_sites, dtype=torch.float64)
    live = {n: torch.ones(t.numel(), dtype=torch.bool) for n, t in values.items()}
    made = []
    for step in range(STEPS + 1):
        for i, name in enumerate(values if step else ()):
            grad = loss_scale * random(*tensors[name].shape, seed=100 * step + i)
            w, grad = (ordered(tensors[name], t, order) for t in (values[name], grad))
            if method.n_stats:
                stats[name] = method.observe(stats[name], w, grad, step)
        if method.observe_sites is not None and step:
            probed = loss_scale * random(num_sites, seed=step).abs().double()
            site_stats = method.observe_sites(site_stats, probed)
        if method.decides_at(step):
            now = {
                n: scored(method, stats[n], ordered(tensors[n], w, order))
                for n, w in values.items()
            }
            shaped = {n: live[n].view(w.shape) for n, w in values.items()}
            decision = method.decide(step, WholeScores(now, shaped, site_stats))
            for name, mask in (*decision.live.items(), *decision.zero.items()):
                assert mask.shape == (values[name].numel(),) and mask.dtype == torch.bool
            live |= decision.live
            made.append((step, decision))
            if method.observes_until is not None and step >= method.observes_until:
                break
    return made


def ordered(spec: TensorSpec, t: Tensor, order: Tensor | None) -> Tensor:
    axis = spec.component_axis
    return t if order is None or axis is None else t.index_select(axis, order)


def scored(method: Method, stats: Stats, w: Tensor) -> Tensor:
    try:
        return method.score(stats, w)
    except IndexError:  # it keeps no statistics, so it will not ask
        return torch.full_like(w, torch.nan)


def same(first: list[tuple[int, Decision]], second: list[tuple[int, Decision]]) -> bool:
    return len(first) == len(second) and all(
        a[0] == b[0]
        and (a[1].components, a[1].log_values) == (b[1].components, b[1].log_values)
        and all(
            m.keys() == n.keys() and all(torch.equal(m[k], n[k]) for k in m)
            for m, n in ((a[1].live, b[1].live), (a[1].zero, b[1].zero))
        )
        for a, b in zip(first, second, strict=True)
    )


def test_equal_scores_give_equal_decisions_and_there_are_some(method: Method, law: Law) -> None:
    made = course(method)
    assert same(made, course(method))
    if law.decides:
        assert len({step for step, _ in made}) > 2
        dead = [~m for _, d in made for m in d.live.values()]
        assert any(m.any() for m in (*dead, *(m for _, d in made for m in d.zero.values())))


def test_a_loss_eight_times_as_large_decides_the_same(method: Method) -> None:
    assert same(course(method), course(method, loss_scale=8.0))


# Not IncreLoRA: its components open in the order of their slots, so in another order others would.
@pytest.mark.parametrize("name", [n for n, law in LAWS.items() if not law.first_component_first])
def test_components_in_another_order_are_decided_in_that_order(name: str) -> None:
    method = build(LAWS[name].on, LAWS[name])
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    tensors = specs(method)

    def masks(of: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {
            n: ordered(tensors[n], mask.view(tensors[n].shape), order).flatten()
            for n, mask in of.items()
        }

    def slots(components: Components) -> Components:
        computed = [
            slot
            for slot, component in enumerate(order.tolist())
            if component in components.computed
        ]
        return Components(computed=tuple(computed), open=components.open)

    wanted = []
    for step, d in course(method):
        components = {site: slots(p) for site, p in d.components.items()}
        wanted.append(
            (step, replace(d, live=masks(d.live), zero=masks(d.zero), components=components))
        )
    assert same(course(method, order), wanted)


def test_off_leaves_everything_alive(law: Law) -> None:
    method = build(law.off, law)
    for _, decision in course(method):
        assert all(mask.all() for mask in decision.live.values())
        assert not any(mask.any() for mask in decision.zero.values())
        assert all(p.computed == tuple(range(6)) for p in decision.components.values())
    update = Update(step=STEPS, lr=0.1, denominator=torch.ones(101))
    for spec in specs(method).values():
        assert spec.project is None or torch.equal(spec.project(random(101), update), random(101))


def test_a_method_decides_or_writes_anew() -> None:
    """A step has one row in the log."""
    writing = Rewriting(at=lambda step: step == 3, write=lambda whole: Rewritten())
    with pytest.raises(AssertionError, match="both"):
        Method(name="both", rewriting=writing, decide=lambda step, scores: Decision())
