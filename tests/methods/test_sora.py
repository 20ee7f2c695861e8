"""SoRA: golden numbers of the paper's and the released operator, the L1 problem, stages, ranks.

Shapes: T tokens, I in_features, O out_features, R rank.
"""

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sparse_lora_dist.methods.protocol.form import Site, Update
from sparse_lora_dist.methods.protocol.method import Method, RunContext
from sparse_lora_dist.methods.shared.schedules import equal_stages, stage_at
from sparse_lora_dist.methods.sora import (
    TRAVEL,
    SoraOptions,
    gate_in_b,
    gated_delta,
    released_threshold,
    soft_threshold,
    sora,
)
from sparse_lora_dist.run_folder.metrics_file import read_records
from tests.conftest import Ranks
from tests.fixtures.tiny_run import TinyRun
from tests.fixtures.whole_scores import WholeScores
from tests.tiers import in_full
from tests.work.growth import whole_masters

SITES = (
    Site(name="q", in_features=24, out_features=16, rank=8),
    Site(name="k", in_features=24, out_features=10, rank=8),
)
LEARNING_RATE = 2e-4


def context(total_steps: int = 100, sites: tuple[Site, ...] = SITES) -> RunContext:
    return RunContext(
        total_steps=total_steps, warmup_steps=0, learning_rate=LEARNING_RATE, sites=sites
    )


def update(step: int = 1, lr: float | Tensor = 1.0, denominator: float = 1.0) -> Update:
    return Update(step=step, lr=lr, denominator=torch.tensor(denominator))


def projected(method: Method, gate_R: Tensor, how: Update) -> Tensor:
    project = method.form(SITES[0]).tensors["lora_gate"].project
    assert project is not None
    return project(gate_R, how)


def random_tensors(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"lora_a": (8, 24), "lora_b": (16, 8), "lora_gate": (8,)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


# --- the operators ------------------------------------------------------------------------------

AT_0_1 = [0.35, 0.2, 0.15, 0.1, 0.05, 0.0]


def test_the_soft_threshold_is_the_papers() -> None:
    w = torch.tensor([*AT_0_1, *(-x for x in AT_0_1)])
    wanted = torch.tensor([0.25, 0.1, 0.05, 0.0, 0.0, 0.0])
    torch.testing.assert_close(soft_threshold(w, 0.1), torch.cat([wanted, -wanted]))
    assert (soft_threshold(w, 0.1) == 0).tolist() == [False, False, False, True, True, True] * 2


def test_the_soft_threshold_composes_is_odd_and_draws_nothing_apart() -> None:
    generator = torch.Generator().manual_seed(0)
    w, v = torch.randn(2, 1000, generator=generator, dtype=torch.float64)
    composed = soft_threshold(soft_threshold(w, 0.3), 0.2)
    torch.testing.assert_close(composed, soft_threshold(w, 0.5), rtol=0, atol=1e-15)
    assert torch.equal(soft_threshold(-w, 0.3), -soft_threshold(w, 0.3))
    assert torch.equal(soft_threshold(w, 0.0), w)
    assert torch.equal(soft_threshold(w, 0.3) == 0, w.abs() <= 0.3)
    apart = (soft_threshold(w, 0.3) - soft_threshold(v, 0.3)).abs()
    assert (apart <= (w - v).abs() + 1e-15).all()


def test_one_threshold_an_entry_is_that_of_each_entry() -> None:
    """Entries of different age have different learning rates."""
    w, xi = torch.tensor([1.0, 1.0, -1.0]), torch.tensor([0.0, 0.25, 2.0])
    assert soft_threshold(w, xi).tolist() == [1.0, 0.75, 0.0]


def test_the_released_operator_has_its_dead_zone_and_its_fixed_points() -> None:
    w = torch.tensor([*AT_0_1, *(-x for x in AT_0_1)])
    wanted = torch.tensor([0.25, 0.1, 0.0, 0.1, 0.0, 0.0])
    torch.testing.assert_close(released_threshold(w, 0.1), torch.cat([wanted, -wanted]))


def test_the_released_operator_does_not_compose() -> None:
    w = torch.tensor([0.25])
    twice = released_threshold(released_threshold(w, 0.1), 0.1)
    assert twice.tolist() == [0.0] and released_threshold(w, 0.2).tolist() == [0.0]
    w = torch.tensor([0.45])
    twice = released_threshold(released_threshold(w, 0.125), 0.125)
    torch.testing.assert_close(twice, torch.tensor([0.2]))
    assert released_threshold(w, 0.25).tolist() == [0.0]


# --- the L1 problem -----------------------------------------------------------------------------


def ista(gradient: Any, gate_R: Tensor, *, lam: float, rate: float, steps: int) -> Tensor:
    """Gradient descent whose steps end in the method's own projection."""
    method = sora(SoraOptions(sora_lambdas=(lam,)), context())
    for _ in range(steps):
        gate_R = projected(method, gate_R - rate * gradient(gate_R), update(lr=rate))
    return gate_R


def test_gradient_descent_ends_where_the_l1_problem_is_solved() -> None:
    generator = torch.Generator().manual_seed(1)
    x_NR = torch.randn(400, 16, generator=generator, dtype=torch.float64)
    true_R = torch.zeros(16, dtype=torch.float64)
    true_R[:5] = torch.tensor([2.0, -1.5, 1.0, 0.7, -0.4])
    y_N = x_NR @ true_R + 0.1 * torch.randn(400, generator=generator, dtype=torch.float64)

    def gradient(gate_R: Tensor) -> Tensor:
        return x_NR.t() @ (x_NR @ gate_R - y_N) / 400

    gate_R = ista(gradient, torch.ones(16).double(), lam=0.2, rate=0.5, steps=300)
    live, left = gate_R != 0, gradient(gate_R)
    assert torch.equal(live, true_R != 0)
    torch.testing.assert_close(left[live], -0.2 * gate_R[live].sign(), rtol=0, atol=1e-12)
    assert (left[~live].abs() <= 0.2).all()


@pytest.mark.parametrize("a", [1.3, 0.1, -0.6])
def test_in_one_dimension_the_solution_is_the_threshold_itself(a: float) -> None:
    a_1 = torch.tensor([a], dtype=torch.float64)
    found = ista(lambda g: g - a_1, torch.ones(1).double(), lam=0.4, rate=0.5, steps=200)
    torch.testing.assert_close(found, soft_threshold(a_1, 0.4))


@pytest.mark.parametrize("threshold", ["exact", "released"])
def test_gates_without_gradients_close_at_the_pace_of_the_threshold(threshold: Any) -> None:
    """From N(0, 1), P(|Z| <= steps * xi) are closed."""
    method = sora(SoraOptions(sora_threshold=threshold, sora_lambdas=(0.03,)), context())
    gate_R = torch.randn(40_000, generator=torch.Generator().manual_seed(2))
    for step in range(1, 41):
        gate_R = projected(method, gate_R, update(lr=1.0))
        if step in (10, 20, 40):
            closed = float((gate_R == 0).double().mean())
            # The released operator closes what the next step would.
            xi = 0.03 * (step + (threshold == "released"))
            assert closed == pytest.approx(math.erf(xi / math.sqrt(2.0)), abs=0.01)


# --- what project does --------------------------------------------------------------------------


def test_the_threshold_is_the_learning_rate_times_lambda() -> None:
    method = sora(SoraOptions(sora_lambdas=(0.5,)), context())
    how = update(lr=0.1, denominator=7.0)
    torch.testing.assert_close(projected(method, torch.ones(2), how), torch.full((2,), 0.95))


def test_the_scaled_threshold_is_divided_as_adam_divides_the_gradient() -> None:
    options = SoraOptions(sora_threshold="scaled", sora_lambdas=(0.0, 0.5))
    how = update(step=51, lr=0.1, denominator=0.25)
    found = projected(sora(options, context()), torch.ones(2), how)
    torch.testing.assert_close(found, torch.full((2,), 0.8))


def test_lambda_zero_is_plain_gated_lora_to_the_bit() -> None:
    method = sora(SoraOptions(sora_lambdas=(0.0,)), context())
    gate_R = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(projected(method, gate_R, update()), gate_R)
    assert method.penalty is None


# --- the tensors --------------------------------------------------------------------------------


def test_the_tensors_are_loras_and_gates_that_never_decay() -> None:
    specs = sora(SoraOptions(), context()).form(SITES[0]).tensors
    assert {name: (spec.shape, spec.component_axis) for name, spec in specs.items()} == {
        "lora_a": ((8, 24), 0),
        "lora_b": ((16, 8), 1),
        "lora_gate": ((8,), 0),
    }
    assert not specs["lora_gate"].decays
    assert specs["lora_a"].project is None and specs["lora_b"].project is None


def test_the_exported_pair_and_the_open_components_alone_give_the_same_delta() -> None:
    tensors = random_tensors()
    tensors["lora_gate"][[1, 4, 5]] = 0.0
    x_TI = torch.randn(12, 24, generator=torch.Generator().manual_seed(1))
    whole_TO = gated_delta(x_TI, tensors, 2.0)
    a_RI, b_OR = gate_in_b(tensors)
    torch.testing.assert_close((x_TI @ a_RI.t()) @ b_OR.t() * 2.0, whole_TO)
    kept = [0, 2, 3, 6, 7]
    pruned = {
        "lora_a": tensors["lora_a"][kept],
        "lora_b": tensors["lora_b"][:, kept],
        "lora_gate": tensors["lora_gate"][kept],
    }
    torch.testing.assert_close(gated_delta(x_TI, pruned, 2.0), whole_TO)


def test_a_closed_gate_still_has_a_gradient_but_its_row_and_column_have_none() -> None:
    tensors = random_tensors()
    tensors["lora_gate"][2] = 0.0
    for t in tensors.values():
        t.requires_grad_()
    gated_delta(torch.randn(12, 24), tensors, 1.0).square().sum().backward()
    a_RI, b_OR, gate_R = (t.grad for t in tensors.values())
    assert a_RI is not None and b_OR is not None and gate_R is not None
    assert gate_R[2] != 0 and (a_RI[2] == 0).all() and (b_OR[:, 2] == 0).all()


# --- stages -------------------------------------------------------------------------------------


def test_lambdas_rise_by_equal_stages() -> None:
    method = sora(SoraOptions(sora_lambdas=(0.0, 0.25, 0.5), sora_reset_moments=True), context(100))
    assert method.stages == (33, 66, 100)
    assert method.stage_rate == "own" and method.stage_resets_moments
    left = {s: float(projected(method, torch.ones(1), update(step=s))) for s in (1, 33, 34, 66, 67)}
    assert left == {1: 1.0, 33: 1.0, 34: 0.75, 66: 0.75, 67: 0.5}
    assert all(method.decides_at(step) for step in (33, 66, 100))


def test_one_lambda_is_a_run_without_stages() -> None:
    method = sora(SoraOptions(sora_lambdas=(0.5,)), context())
    assert method.stages == () and not method.stage_resets_moments


@pytest.mark.parametrize(("steps", "stages"), [(7, 7), (10, 3), (100, 1), (101, 7)])
def test_every_step_belongs_to_one_stage_and_the_stages_differ_by_one_at_most(
    steps: int, stages: int
) -> None:
    ends = equal_stages(steps, stages)
    lengths = [b - a for a, b in zip((0, *ends), ends, strict=False)]
    assert sum(lengths) == steps and len(lengths) == stages and max(lengths) - min(lengths) <= 1
    at = [stage_at(step, ends) for step in range(1, steps + 1)]
    assert [at.count(i) for i in range(stages)] == lengths and at == sorted(at)
    assert stage_at(steps + 5, ends) == stages - 1


def test_gates_can_travel_alike_in_runs_of_any_length_and_rate() -> None:
    for steps in (30, 3000):
        gate = sora(SoraOptions(), context(steps)).form(SITES[0]).tensors["lora_gate"]
        assert gate.lr_factor * LEARNING_RATE * steps == pytest.approx(TRAVEL)
    staged = SoraOptions(sora_lambdas=(0.1, 0.2, 0.3, 0.4))
    gate = sora(staged, context(400)).form(SITES[0]).tensors["lora_gate"]
    assert gate.lr_factor * LEARNING_RATE * 100 == pytest.approx(TRAVEL)
    given = (
        sora(SoraOptions(sora_gate_lr_factor=3.0), context()).form(SITES[0]).tensors["lora_gate"]
    )
    assert given.lr_factor == 3.0


# --- decisions ----------------------------------------------------------------------------------


def gate_scores(closed: dict[str, list[int]]) -> WholeScores:
    method, values = sora(SoraOptions(), context()), {}
    for site in SITES:
        for name, spec in method.form(site).tensors.items():
            values[f"{site.name}.{name}"] = torch.full(spec.shape, -0.5)
        values[f"{site.name}.lora_gate"][closed.get(site.name, [])] = 0.0
    return WholeScores({name: method.score((), w) for name, w in values.items()})


def test_ranks_are_counted_and_closed_gates_are_computed_on() -> None:
    method = sora(SoraOptions(sora_lambdas=(0.3, 0.6)), context())
    decision = method.decide(51, gate_scores({"q": [1, 4], "k": list(range(8))}))
    assert decision.components["q"].open == 6 and decision.components["k"].open == 0
    assert all(p.computed == tuple(range(8)) for p in decision.components.values())
    assert not decision.live and not decision.zero and decision.log_values == {"lambda": 0.6}


def test_without_reopening_closed_components_die_and_are_left_out() -> None:
    method = sora(SoraOptions(sora_reopen=False), context())
    decision = method.decide(50, gate_scores({"q": [1, 4], "k": list(range(8))}))
    assert (
        decision.components["q"].computed == (0, 2, 3, 5, 6, 7)
        and decision.components["q"].open == 6
    )
    assert decision.components["k"].computed == ()
    alive = torch.tensor([i not in (1, 4) for i in range(8)])
    assert torch.equal(decision.live["q.lora_gate"], alive)
    assert torch.equal(decision.live["q.lora_a"].view(8, 24), alive[:, None].expand(8, 24))
    assert torch.equal(decision.live["q.lora_b"].view(16, 8), alive.expand(16, 8))
    assert not decision.live["k.lora_a"].any() and len(decision.live) == 6


def test_gates_are_counted_every_so_many_steps_and_at_both_ends_of_a_stage() -> None:
    method = sora(SoraOptions(sora_every=30), context(100))
    assert [s for s in range(101) if method.decides_at(s)] == [1, 30, 60, 90, 100]
    method = sora(SoraOptions(sora_every=30, sora_lambdas=(0.1, 0.2)), context(100))
    decided = [s for s in range(101) if method.decides_at(s)]
    assert decided == [1, 30, 50, 51, 60, 90, 100]
    # So no step is logged with the lambda of another stage.
    facts = [
        method.decide(s, gate_scores({"q": [], "k": []})).log_values["lambda"] for s in decided
    ]
    assert facts == [0.1, 0.1, 0.1, 0.2, 0.2, 0.2, 0.2]
    assert sum(sora(SoraOptions(), context(1000)).decides_at(s) for s in range(1001)) == 51
    assert [s for s in range(4) if sora(SoraOptions(), context(3)).decides_at(s)] == [1, 2, 3]


# --- learning -----------------------------------------------------------------------------------


def learn(options: SoraOptions, steps: int, seed: int, *, apart: bool) -> tuple[Tensor, float]:
    """(open gates, squared error of the delta in that of none) on a planted delta of rank 2.

    ``apart``: each component reads four features of its own, components 0 and 1 what is to be read.
    """
    generator = torch.Generator().manual_seed(seed)
    site = Site(name="q", in_features=32, out_features=16, rank=8)
    run = RunContext(total_steps=steps, warmup_steps=0, learning_rate=1.0 / steps, sites=(site,))
    specs, w = sora(options, run).form(site).tensors, {}
    for name, spec in specs.items():
        w[name] = torch.zeros(spec.shape)
        spec.init(w[name], generator)
    read_2I = torch.randn(2, 32, generator=generator)
    if apart:
        own_RI = torch.eye(8).repeat_interleave(4, dim=1)
        w["lora_a"] *= own_RI * 8**0.5
        read_2I *= own_RI[:2]
    read_2I /= read_2I.norm(dim=1, keepdim=True)
    if apart:
        w["lora_a"][:2] = read_2I * w["lora_a"][:2].norm(dim=1, keepdim=True)
    wanted_OI = torch.randn(16, 2, generator=generator) @ read_2I
    adam = torch.optim.Adam(
        [{"params": [t.requires_grad_()], "factor": specs[n].lr_factor} for n, t in w.items()]
    )
    for step in range(1, steps + 1):
        x_TI = torch.randn(32, 32, generator=generator)
        noise_TO = 0.5 * torch.randn(32, 16, generator=generator)
        wanted_TO = x_TI @ wanted_OI.t() + noise_TO
        adam.zero_grad()
        (gated_delta(x_TI, w, 2.0) - wanted_TO).square().mean().backward()
        rate = (1.0 + math.cos(math.pi * (step - 1) / steps)) / 2.0 / steps
        for group in adam.param_groups:
            group["lr"] = rate * group["factor"]
        adam.step()
        project, how = specs["lora_gate"].project, update(step, rate * specs["lora_gate"].lr_factor)
        assert project is not None
        w["lora_gate"].data = project(w["lora_gate"].detach(), how)
    a_RI, b_OR = gate_in_b({name: t.detach() for name, t in w.items()})
    error = (2.0 * b_OR @ a_RI - wanted_OI).square().sum() / wanted_OI.square().sum()
    return w["lora_gate"].detach() != 0, float(error)


@pytest.mark.parametrize(("steps", "error"), [(30, 0.75), (100, 0.3), (300, 0.15)])
def test_by_default_runs_of_any_length_close_a_part_of_the_gates_and_learn(
    steps: int, error: float
) -> None:
    runs = [learn(SoraOptions(), steps, seed, apart=False) for seed in range(4)]
    num_open = [int(open_R.sum()) for open_R, _ in runs]
    assert all(1 <= n <= 7 for n in num_open) and 8 <= sum(num_open) <= 24
    assert sum(e for _, e in runs) / 4 < error


def test_components_with_nothing_to_learn_close_and_those_with_stay() -> None:
    options = SoraOptions(sora_lambdas=(1.1,), sora_gate_init="ones", sora_gate_lr_factor=4.0)
    runs = [learn(options, 30, seed, apart=True) for seed in range(4)]
    assert all(bool(open_R[:2].all()) for open_R, _ in runs)
    assert sum(int(open_R.sum()) for open_R, _ in runs) <= 24


# --- real runs ----------------------------------------------------------------------------------


@pytest.mark.parametrize("reopen", [True, in_full(False)])
def test_a_gate_at_zero_opens_again_in_a_real_run_unless_told_not_to(
    ranks: Ranks, tiny: TinyRun, tmp_path: Path, reopen: bool
) -> None:
    """Where lambda is well below 1, an update of Adam's is larger than the threshold at times."""
    options: dict[str, Any] = {"method": "sora", "sora_lambdas": 0.5, "max_steps": 30}
    options |= {} if reopen else {"sora_reopen": False}
    masters = whole_masters(
        ranks(2, "tests.work.growth:watch", flags=tiny.flags(tmp_path, **options))
    )
    sites = [n.removesuffix(".lora_gate") for n in masters[0] if n.endswith("lora_gate")]
    closed_NSR = torch.stack([torch.stack([w[f"{s}.lora_gate"] for s in sites]) for w in masters])
    closed_NSR = closed_NSR == 0
    opened_again = closed_NSR[:-1] & ~closed_NSR[1:]
    assert closed_NSR.any() and opened_again.any() == reopen

    # What the log says of a step is what its decision found, before the update.
    rows = read_records(tmp_path / "decisions.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 31))
    for row, closed_SR in zip(rows, closed_NSR, strict=False):
        assert [row["ranks"][s] for s in sites] == (~closed_SR).sum(1).tolist()
    dropped_SR = torch.zeros_like(closed_NSR[0]) if reopen else closed_NSR[-2]
    for site, dropped_R in zip(sites, dropped_SR, strict=True):
        a_RI, b_OR = (masters[-1][f"{site}.lora_{x}"] for x in "ab")
        assert torch.equal((a_RI == 0).all(1), dropped_R)
        assert torch.equal((b_OR == 0).all(0), dropped_R)


# --- released -----------------------------------------------------------------------------------


def test_the_released_preset_is_the_released_code() -> None:
    method = sora(SoraOptions(sora_preset="released"), context())
    gate = method.form(SITES[0]).tensors["lora_gate"]
    assert gate.lr_factor == 1.0 and not gate.decays
    gate_R = torch.zeros(10_000)
    gate.init(gate_R, torch.Generator().manual_seed(0))
    assert abs(float(gate_R.mean())) < 0.03 and float(gate_R.std()) == pytest.approx(1.0, abs=0.03)
    # Whatever the learning rate: 3e-4, and its dead zone.
    w = torch.tensor([1.0, 5e-4, 2e-4, -1.0])
    for lr in (0.0, 1.0):
        found = projected(method, w, update(lr=lr))
        torch.testing.assert_close(found, torch.tensor([0.9997, 0.0, 0.0, -0.9997]))


def test_the_released_l1_term_is_ten_times_the_mean_size_of_all_gates() -> None:
    method = sora(SoraOptions(sora_preset="released"), context())
    gates = [torch.randn(8, requires_grad=True) for _ in SITES]
    (10.0 * sum(g.abs().sum() for g in gates) / sum(len(g) for g in gates)).backward()  # type: ignore[union-attr]
    assert method.penalty is not None
    for gate_R in gates:
        assert gate_R.grad is not None
        penalty = method.penalty({"lora_gate": gate_R.detach()})
        torch.testing.assert_close(penalty, {"lora_gate": gate_R.grad})
    assert method.penalty({"lora_gate": torch.zeros(1)})["lora_gate"].item() == 0.0


def test_released_stages_after_the_first_run_at_rate_zero() -> None:
    options = SoraOptions(sora_preset="released", sora_lambdas=(0.0, 1e-4, 2e-4))
    method = sora(options, context())
    assert method.stage_rate == "first" and len(method.stages) == 3


def test_what_the_user_gives_wins_over_the_preset() -> None:
    options = SoraOptions(
        sora_preset="released", sora_threshold="exact", sora_gate_init="ones", sora_l1=0.0
    )
    method = sora(options, context())
    gate_R = torch.zeros(8)
    method.form(SITES[0]).tensors["lora_gate"].init(gate_R, torch.Generator())
    assert gate_R.tolist() == [1.0] * 8
    assert method.penalty is None
    found = projected(method, torch.ones(1), update(lr=100.0))
    torch.testing.assert_close(found, torch.tensor([0.97]))


# --- options ------------------------------------------------------------------------------------


def test_bad_options_are_told_together() -> None:
    with pytest.raises(ValueError) as error:
        SoraOptions(
            sora_lambdas=(0.2, 0.1),
            sora_gate_lr_factor=0.0,
            sora_l1=-1.0,
            sora_every=0,
            sora_threshold="scaled",
        )
    for name in ("lambdas must be", "gate_lr_factor", "l1", "every", "threshold scaled"):
        assert f"sora_{name}" in str(error.value)


@pytest.mark.parametrize("lambdas", [(-0.1,), (0.1, 0.1), (0.2, 0.1), (math.nan,)])
def test_lambdas_that_do_not_rise_from_zero_or_above_are_refused(
    lambdas: tuple[float, ...],
) -> None:
    with pytest.raises(ValueError, match="sora_lambdas must be"):
        SoraOptions(sora_lambdas=lambdas)


def test_every_option_has_a_name_of_its_own() -> None:
    assert all(f.name.startswith("sora_") for f in dataclasses.fields(SoraOptions))


def test_more_stages_than_steps_are_refused() -> None:
    with pytest.raises(ValueError, match="3 stages, but the run has 2 steps.* most 2 stages fit"):
        sora(SoraOptions(sora_lambdas=(0.1, 0.2, 0.3)), context(2))
