"""IncreLoRA: what is open, trained and computed after every decision, and the presets' rules."""

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from sparse_lora_dist.methods.increlora import INCRELORA, IncreLoraOptions, increlora
from sparse_lora_dist.methods.protocol.form import Site, Tensors
from sparse_lora_dist.methods.protocol.method import Components, Decision, Method, RunContext, Stats
from tests.fixtures.whole_scores import WholeScores

IN, OUT = 3, 2


def context(sites: int = 4, rank: int = 8, steps: int = 100) -> RunContext:
    return RunContext(
        total_steps=steps,
        warmup_steps=0,
        learning_rate=1e-3,
        sites=tuple(
            Site(name=f"m.{i}", in_features=IN, out_features=OUT, rank=rank) for i in range(sites)
        ),
    )


def options(**given: Any) -> IncreLoraOptions:
    return IncreLoraOptions(**{f"increlora_{name}": value for name, value in given.items()})


class Run:
    """A run in which only the method's decisions happen, the scores being given."""

    def __init__(self, chosen: IncreLoraOptions, of: RunContext) -> None:
        self.context, self.method = of, increlora(chosen, of)
        self.shapes = {
            f"{site.name}.{name}": spec.shape
            for site in of.sites
            for name, spec in self.method.form(site).tensors.items()
        }
        self.live = {n: torch.zeros(shape).bool() for n, shape in self.shapes.items()}
        self.components: dict[str, Components] = {}
        self.totals: list[int] = []
        self.decisions: dict[int, Decision] = {}

    def decide(self, step: int, of_sites: list[float]) -> Decision:
        """One decision, with the same score for every entry of a site."""
        values = {
            name: torch.full(shape, of_sites[int(name.split(".")[1])])
            for name, shape in self.shapes.items()
        }
        stats = torch.stack([torch.tensor(of_sites), torch.ones(len(of_sites))]).double()
        decision = self.method.decide(step, WholeScores(values, self.live, stats))
        for name, mask in decision.live.items():
            assert mask.dtype == torch.bool and mask.shape == (self.live[name].numel(),)
            self.live[name] = mask.view(self.shapes[name])
        self.components |= decision.components
        if decision.components:
            self.totals.append(int(decision.log_values["budget"]))
            assert self.totals[-1] == sum(self.ranks())
        self.decisions[step] = decision
        return decision

    def go(self, of_sites: list[float] | None = None) -> "Run":
        """The whole run. Scores: as given, or new ones at each decision, all different."""
        for step in range(self.context.total_steps + 1):
            if self.method.decides_at(step):
                generator = torch.Generator().manual_seed(step)
                drawn = torch.randperm(len(self.context.sites), generator=generator) + 1.0
                self.decide(step, of_sites or drawn.tolist())
        return self

    def ranks(self) -> list[int]:
        return [self.components[site.name].open for site in self.context.sites]

    def moving(self, site: int) -> tuple[int, int, int]:
        """Components whose a, b, lambda live; all of them whole, and the first ones."""
        counts = []
        for name in ("lora_a", "lora_b", "lora_lambda"):
            mask = self.live[f"m.{site}.{name}"]
            lines = mask.t() if name == "lora_b" else mask.view(len(mask), -1)
            assert (lines.all(1) == lines.any(1)).all()
            alive = lines.all(1)
            assert alive[: int(alive.sum())].all()
            counts.append(int(alive.sum()))
        return counts[0], counts[1], counts[2]


# --- start, reserve, end --------------------------------------------------------------------------


def test_at_first_the_start_is_open_and_one_component_more_learns_in_advance() -> None:
    run = Run(options(start_rank=2), context())
    assert run.method.decides_at(0)
    decision = run.decide(0, [0.0] * 4)
    assert run.components == {f"m.{i}": Components(computed=(0, 1, 2), open=2) for i in range(4)}
    assert all(run.moving(i) == (3, 3, 2) for i in range(4))
    assert not decision.zero and decision.log_values == {"budget": 8.0}


@pytest.mark.parametrize("start", [1, 3])
def test_lambda_starts_at_zero_where_open_and_at_the_reserves_elsewhere(start: int) -> None:
    spec = (
        increlora(options(start_rank=start), context())
        .form(context().sites[0])
        .tensors["lora_lambda"]
    )
    values = torch.empty(spec.shape)
    spec.init(values, torch.Generator())
    assert (values[:start] == 0).all() and (values[start:] == 1e-5).all()


def test_the_delta_starts_at_next_to_nothing() -> None:
    site = Site(name="s", in_features=64, out_features=48, rank=4)
    method, generator = increlora(options(), context(rank=4)), torch.Generator().manual_seed(0)
    tensors = {}
    for name, spec in method.form(site).tensors.items():
        tensors[name] = torch.empty(spec.shape)
        spec.init(tensors[name], generator)
    a_RI, b_OR = method.form(site).to_lora(tensors)
    assert 0.0 < float((b_OR @ a_RI).abs().max()) < 1e-5


def test_a_growth_opens_the_reserve_first_and_what_follows_becomes_the_reserve() -> None:
    run = Run(options(budget=16, modules=2, pieces=2, every=10), context())
    run.decide(0, [0.0] * 4)
    decision = run.decide(20, [1.0, 4.0, 2.0, 3.0])
    assert run.ranks() == [1, 3, 1, 3]
    assert run.components["m.1"] == Components(computed=(0, 1, 2, 3), open=3)
    assert run.moving(1) == (4, 4, 3) and run.moving(0) == (2, 2, 1)
    assert not decision.zero


def test_a_linear_at_its_capacity_has_no_reserve_and_grows_no_more() -> None:
    run = Run(options(budget=11, modules=1, pieces=3, every=10), context(rank=4))
    run.decide(0, [0.0] * 4)
    run.decide(20, [1.0, 4.0, 2.0, 3.0])
    assert run.components["m.1"] == Components(computed=(0, 1, 2, 3), open=4)
    assert run.moving(1) == (4, 4, 4)
    run.decide(30, [1.0, 4.0, 2.0, 3.0])
    assert run.ranks() == [1, 4, 1, 4]


def test_what_a_linear_has_no_room_for_goes_to_the_next_in_order() -> None:
    run = Run(options(budget=12, start_rank=2, modules=1, pieces=3, every=10), context(rank=4))
    run.decide(0, [0.0] * 4)
    run.decide(20, [1.0, 4.0, 2.0, 3.0])
    assert run.ranks() == [2, 4, 2, 3]


def test_at_the_budget_reserves_die_and_their_lambda_is_zeroed() -> None:
    run = Run(options(budget=7, modules=2, pieces=2, every=10), context()).go([1.0, 4.0, 2.0, 3.0])
    assert run.totals == [4, 7] and run.ranks() == [1, 3, 1, 2]
    for i, rank in enumerate(run.ranks()):
        assert run.moving(i) == (rank, rank, rank)
        assert run.components[f"m.{i}"].computed == tuple(range(rank))
        zeroed = run.decisions[20].zero[f"m.{i}.lora_lambda"]
        assert zeroed.tolist() == [False] * rank + [True] * (8 - rank)
    assert all(name.endswith("lora_lambda") for name in run.decisions[20].zero)


def test_a_start_at_the_budget_needs_no_reserve_and_no_statistics() -> None:
    for score in ("triplet", "delta"):
        run = Run(options(start_rank=3, target_rank=3, score=score), context()).go()
        assert run.totals == [12]
        assert all(run.moving(i) == (3, 3, 3) for i in range(4))
        method = run.method
        assert (method.n_stats, method.n_site_stats, method.probe) == (0, 0, None)
        assert not any(method.decides_at(step) for step in range(1, 101))


def test_the_total_never_falls_nor_passes_the_budget_and_all_of_it_is_used() -> None:
    for budget in range(4, 33):
        run = Run(options(budget=budget, modules=3, pieces=2, every=4), context(rank=8)).go()
        assert run.totals == sorted(set(run.totals)) and run.totals[-1] == budget
        assert max(run.ranks()) <= 8


def test_permuting_the_scores_of_linears_permutes_what_they_get() -> None:
    given, order = [5.0, 1.0, 4.0, 2.0, 3.0], [3, 0, 4, 1, 2]
    straight = Run(options(budget=12, modules=2, pieces=1), context(5)).go(given)
    permuted = Run(options(budget=12, modules=2, pieces=1), context(5)).go(
        [given[i] for i in order]
    )
    assert permuted.ranks() == [straight.ranks()[i] for i in order]
    assert len(set(straight.ranks())) > 1


def test_of_equal_scores_the_first_linears_grow() -> None:
    run = Run(options(budget=10, modules=3, pieces=2, every=10), context()).go([1.0] * 4)
    assert run.ranks() == [3, 3, 3, 1]


# --- scores ---------------------------------------------------------------------------------------


def test_a_linear_scores_by_its_open_components_only() -> None:
    run = Run(options(budget=5, modules=1, pieces=1), context(2))
    run.decide(0, [0.0] * 2)
    values = {name: torch.ones(shape) for name, shape in run.shapes.items()}
    values["m.0.lora_lambda"][1] = 100.0  # the reserve's
    values["m.1.lora_b"][:, 0] = 2.0
    decision = run.method.decide(20, WholeScores(values, run.live))
    assert [decision.components[f"m.{i}"].open for i in (0, 1)] == [1, 2]


def test_the_delta_score_is_the_product_of_both_averages() -> None:
    method = increlora(options(budget=9, modules=1, score="delta", every=10), context(2))
    run = Run(options(budget=9, modules=1, score="delta", every=10), context(2))
    run.decide(0, [0.0] * 2)
    stats = torch.tensor([[3.0, 2.0], [2.0, 4.0]], dtype=torch.float64)
    empty = {name: torch.zeros(shape) for name, shape in run.shapes.items()}
    decision = method.decide(20, WholeScores(empty, run.live, stats))
    assert decision.components["m.1"].open > decision.components["m.0"].open
    stats[1, 0] = float("nan")
    with pytest.raises(FloatingPointError, match="NaN or infinity"):
        method.decide(20, WholeScores(empty, run.live, stats))


def test_linears_are_averaged_as_entries_are() -> None:
    by_delta = increlora(options(score="delta"), context())
    assert by_delta.n_stats == 0 and by_delta.observe_sites is not None
    stats_KS = torch.zeros(by_delta.n_site_stats, 4, dtype=torch.float64)
    for _ in range(3):
        stats_KS = by_delta.observe_sites(stats_KS, torch.ones(4, dtype=torch.float64))
    assert stats_KS[:, 0].tolist() == pytest.approx([0.385875, 0.276356], abs=1e-6)

    by_component = increlora(options(), context())
    assert (
        by_component.n_stats == 2 and by_component.probe is None and by_component.n_site_stats == 0
    )
    stats: Stats = (torch.zeros(1), torch.zeros(1))
    for step in (1, 2, 3):
        stats = by_component.observe(stats, torch.tensor([-0.5]), torch.tensor([2.0]), step)
    assert float(by_component.score(stats, torch.ones(1))) == pytest.approx(0.106639, abs=1e-6)


def probed(method: Method) -> float:
    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))

    tensors = {"lora_a": random(2, IN), "lora_b": random(OUT, 2), "lora_lambda": random(2)}
    assert method.probe is not None
    return float(method.probe(random(5, IN), random(5, OUT), tensors, 2.0))


def test_the_presets_probe_and_penalise_as_they_say() -> None:
    paper = increlora(options(score="delta"), context())
    released = increlora(options(preset="released"), context())
    assert probed(released) / probed(paper) == pytest.approx((IN * OUT) ** 0.5)

    tensors = {"lora_a": 2.0 * torch.eye(2, IN), "lora_b": torch.eye(OUT, 2)}

    def by_a(method: Method) -> Tensor:
        assert method.penalty is not None
        return method.penalty(tensors)["lora_a"]

    # A A^T - 1 is 3 times the identity, of norm 3 sqrt 2.
    torch.testing.assert_close(by_a(paper), 0.1 * 4 * 3 * 2.0 * torch.eye(2, IN))
    expected = 0.1 / 8 * 2 * 3 * 2.0 / (3 * 2**0.5) * torch.eye(2, IN)
    torch.testing.assert_close(by_a(released), expected)
    assert increlora(options(orthogonality=0.0), context()).penalty is None


# --- trajectories of the released scripts, and what the default makes of them ---------------------

RTE_2 = {"budget": 144, "modules": 5, "pieces": 1}
RTE_8 = {"budget": 576, "modules": 9, "pieces": 4}
MRPC_8 = {"budget": 576, "modules": 10, "pieces": 4}
QNLI_8 = {"target_rank": 8.0, "modules": 22, "pieces": 4}


@pytest.mark.parametrize(
    ("preset", "script", "first", "last"),
    [
        ("paper", RTE_2, [72, 77, 82], [142, 144]),
        ("released", RTE_2, [72, 77, 82], [142, 144]),
        ("paper", {"target_rank": 2.0, "modules": 2, "pieces": 1}, [72, 74, 76], [142, 144]),
        ("paper", RTE_8, [72, 108], [540, 576]),
        ("released", RTE_8, [72, 108], [540, 576]),
        ("paper", MRPC_8, [72, 112], [512, 552, 576]),
        ("released", MRPC_8, [72, 112], [512, 552, 592]),
        ("paper", QNLI_8, [72, 160], [424, 512, 576]),
        ("released", QNLI_8, [72, 160], [424, 512, 600]),
    ],
)
def test_72_linears_grow_as_the_released_scripts_say(
    preset: str, script: Mapping[str, Any], first: list[int], last: list[int]
) -> None:
    chosen = options(preset=preset, every=10, **script)
    run = Run(chosen, context(72, rank=64, steps=500)).go()
    assert run.totals[: len(first)] == first and run.totals[-len(last) :] == last
    rounds = -(-(run.totals[-1] - 72) // (script["modules"] * script["pieces"]))
    assert len(run.totals) == 1 + rounds
    steps = (b - a for a, b in pairwise(run.totals[:-1]))
    assert set(steps) == {script["modules"] * script["pieces"]}

    overshoots = last[-1] > 576
    assert bool(run.method.notes) == overshoots
    if overshoots:
        assert f"{last[-1]} components in all, above the budget of 576" in run.method.notes[0]


def test_after_overshooting_the_released_reserves_stay_as_they_are() -> None:
    run = Run(options(preset="released", budget=7, modules=2, pieces=2, every=10), context()).go()
    assert run.totals == [4, 8]
    assert not any(decision.zero for decision in run.decisions.values())
    for i, rank in enumerate(run.ranks()):
        assert run.moving(i) == (rank + 1, rank + 1, rank)


def test_at_exactly_the_budget_the_released_reserves_die_too() -> None:
    run = Run(options(preset="released", budget=8, modules=2, pieces=2, every=10), context()).go()
    assert run.totals == [4, 8] and run.decisions[20].zero
    assert all(run.moving(i) == (rank,) * 3 for i, rank in enumerate(run.ranks()))


def test_released_ties_all_grow_and_then_no_more() -> None:
    chosen = options(preset="released", budget=10, modules=2, pieces=1, every=10)
    run = Run(chosen, context(6)).go([1.0, 2.0, 1.0, 3.0, 1.0, 0.0])
    assert run.totals[0:2] == [6, 8]
    run = Run(chosen, context(6)).go([1.0, 1.0, 1.0, 3.0, 1.0, 1.0])
    assert run.totals == [6, 12] and run.ranks() == [2] * 6
    assert run.decisions[30] == Decision(log_values={"budget": 12.0})


def test_a_linear_at_its_capacity_is_none_of_the_highest_that_others_tie_with() -> None:
    chosen = options(preset="released", budget=7, modules=1, pieces=1, every=10)
    run = Run(chosen, context(4, rank=2)).go([4.0, 3.0, 3.0, 1.0])
    assert run.totals == [4, 5, 7] and run.ranks() == [2, 2, 2, 1]


def test_the_released_overshoot_ends_where_capacity_does() -> None:
    chosen = options(preset="released", budget=7, modules=2, pieces=2, every=10)
    run = Run(chosen, context(4, rank=2)).go()
    assert run.totals == [4, 8] and run.ranks() == [2, 2, 2, 2]
    assert all(run.moving(i) == (2, 2, 2) for i in range(4))


def test_scales() -> None:
    scale = increlora(options(), context()).form(context().sites[0]).scale
    assert scale(32.0, 16, 1) == scale(32.0, 16, 9) == 2.0
    released = increlora(options(preset="released"), context()).form(context().sites[0]).scale
    assert released(32.0, 16, 4) == 32.0 / (4 + 1e-5)
    ratios = [released(32.0, 16, b) / released(32.0, 16, a) for a, b in ((1, 2), (1, 5), (5, 9))]
    assert ratios == pytest.approx([0.5, 0.2, 0.556], abs=1e-3)


def test_opening_a_trained_reserve_changes_the_function_in_the_released_preset_only() -> None:
    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))

    tensors = {"lora_a": random(3, IN), "lora_b": random(OUT, 3), "lora_lambda": random(3)}
    tensors["lora_lambda"][1:] = 1e-5

    def at(method: Method, computed: int, num_open: int) -> Tensor:
        seen: Tensors = {
            n: t[:, :computed] if n == "lora_b" else t[:computed] for n, t in tensors.items()
        }
        form = method.form(context().sites[0])
        return form.delta(random(5, IN), seen, form.scale(16.0, 8, num_open))

    paper, released = (increlora(options(preset=p), context()) for p in ("paper", "released"))
    torch.testing.assert_close(at(paper, 3, 2), at(paper, 2, 1), rtol=0.0, atol=1e-3)
    torch.testing.assert_close(at(released, 3, 2), 0.5 * at(released, 2, 1), rtol=1e-3, atol=1e-3)


# --- when -----------------------------------------------------------------------------------------


def growth_steps(method: Method, steps: int) -> list[int]:
    return [step for step in range(1, steps + 1) if method.decides_at(step)]


def test_growth_comes_at_multiples_of_every_after_begin_and_ends_at_the_budget() -> None:
    method = increlora(options(budget=10, modules=2, pieces=1, every=7, begin=0.2), context())
    assert growth_steps(method, 100) == [21, 28, 35]
    assert method.observes_until == 35


def test_the_released_code_first_grows_at_twice_every() -> None:
    method = increlora(
        options(preset="released", budget=10, modules=2, pieces=1, every=7), context(steps=30)
    )
    assert growth_steps(method, 30) == [14, 21, 28]


def test_nothing_is_opened_at_the_last_step() -> None:
    method = increlora(options(end=1.0, pieces=1), context(steps=5))
    assert growth_steps(method, 5) == [2, 3, 4]


def test_what_is_born_in_the_run_warms_up_anew() -> None:
    method = increlora(options(every=7), context())
    assert method.newborn_warmup == 7 and method.newborn_restarts
    assert increlora(options(every=7, warmup=0), context()).newborn_warmup == 0


@pytest.mark.parametrize("preset", ["paper", "released"])
@pytest.mark.parametrize("steps", [3, 8, 30, 60, 1000])
@pytest.mark.parametrize(("sites", "rank"), [(1, 6), (14, 16), (72, 8), (14, 1)])
def test_without_options_a_run_of_any_length_grows_to_half_its_capacity(
    preset: str, steps: int, sites: int, rank: int
) -> None:
    run = Run(options(preset=preset), context(sites, rank, steps)).go()
    half = max(sites, sites * rank // 2)
    assert run.totals[-1] == half if preset == "paper" else run.totals[-1] >= half
    last = max(growth_steps(run.method, steps), default=0)
    assert last <= max(round(0.6 * steps), 2) and (last > 1 or rank == 1)


def test_a_usual_run_chooses_among_linears() -> None:
    run = Run(options(), context(14, 16, 30)).go([float(i) for i in range(14)])
    assert run.totals[-1] == 112 and max(run.ranks()) == 16 and min(run.ranks()) == 1


# --- wrong options --------------------------------------------------------------------------------


def test_options_tell_all_that_is_wrong_with_them_at_once() -> None:
    wrong = {
        "start_rank": 0,
        "target_rank": float("nan"),
        "budget": 0,
        "modules": 0,
        "pieces": 0,
        "every": 0,
        "warmup": -1,
        "lambda_lr_factor": 0.0,
        "beta1": 1.0,
        "beta2": -0.1,
        "orthogonality": float("inf"),
    }
    with pytest.raises(ValueError) as error:
        options(begin=0.5, end=1.5, **wrong)
    told = str(error.value).split("; ")
    for name, value in wrong.items():
        assert any(t.startswith(f"--increlora_{name} must be") and str(value) in t for t in told)
    assert any("0 <= begin < end <= 1, got 0.5 and 1.5" in t for t in told)
    assert any("Give one" in t for t in told)
    assert len(told) == len(wrong) + 2


def test_an_end_before_the_presets_begin_is_refused() -> None:
    with pytest.raises(ValueError, match="got 0.1 and 0.05"):
        options(end=0.05)
    options(preset="released", end=0.05)


def test_what_does_not_fit_the_run_is_told_at_once() -> None:
    with pytest.raises(ValueError) as error:
        increlora(options(start_rank=9, budget=33, modules=5, pieces=1, every=60), context())
    told = str(error.value).split("; ")
    assert [t.split(". ")[0] for t in told] == [
        "--increlora_start_rank 9 is above --rank 8",
        "the budget of 33 components is above 32, the sum of the ranks of all linears",
        "the budget of 33 components is below the start, 4 linears x 9",
        "5 linears would grow at a time, but there are 4",
    ]


def test_growth_that_outlasts_the_run_says_by_how_much() -> None:
    slow = options(budget=32, modules=1, pieces=1, every=10, begin=0.0)
    with pytest.raises(ValueError, match="end at step 280 of 100, too late to train what it opens"):
        increlora(slow, context())
    with pytest.raises(ValueError, match="end at step 280 of 280, too late to train what it opens"):
        increlora(slow, context(steps=280))
    assert growth_steps(increlora(slow, context(steps=281)), 281)[-1] == 280


def test_the_factory_makes_it_from_its_defaults() -> None:
    assert INCRELORA.build(INCRELORA.options(), context()).name == "increlora"
