"""What AdaLoRA and IncreLoRA share: the components, their statistics, scores and penalties."""

from collections.abc import Callable
from functools import partial
from math import ceil
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sparse_lora_dist.methods.protocol.form import Site, Tensors, TensorSpec, low_rank_pair, zeros
from sparse_lora_dist.methods.protocol.method import Stats
from sparse_lora_dist.methods.shared import triplets
from sparse_lora_dist.methods.shared.triplets import (
    WITHIN,
    delta_sensitivity,
    lambda_in_a,
    mean_times_spread,
    released_penalty,
    smooth_pair,
    squared_penalty,
    triplet_delta,
    triplet_scores,
    triplet_tensors,
)
from tests.fixtures.whole_scores import WholeScores

IN, OUT, RANK = 7, 30, 3


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)


def components(seed: int = 0) -> dict[str, Tensor]:
    return {
        "lora_a": random(RANK, IN, seed=seed),
        "lora_b": random(OUT, RANK, seed=seed + 1),
        "lora_lambda": random(RANK, seed=seed + 2),
    }


def dense(tensors: Tensors) -> Tensor:
    return tensors["lora_b"] @ torch.diag(tensors["lora_lambda"]) @ tensors["lora_a"]


def smoothed(importances: list[Tensor], beta1: float = 0.85, beta2: float = 0.85) -> list[Tensor]:
    stats: Stats = (torch.zeros_like(importances[0]), torch.zeros_like(importances[0]))
    for importance in importances:
        stats = smooth_pair(stats, importance, beta1=beta1, beta2=beta2)
    return [*stats, mean_times_spread(stats, torch.empty(0))]


# --- the parametrisation --------------------------------------------------------------------------


def test_the_delta_is_that_of_the_dense_product_and_of_the_exported_pair() -> None:
    x, tensors = random(2, 4, IN, seed=9), components()
    expected = 2.0 * x @ dense(tensors).t()
    torch.testing.assert_close(triplet_delta(x, tensors, 2.0), expected)
    a_RI, b_OR = lambda_in_a(tensors)
    torch.testing.assert_close(2.0 * x @ a_RI.t() @ b_OR.t(), expected)


def test_permuting_components_changes_nothing() -> None:
    x, tensors, order = random(4, IN), components(), torch.tensor([2, 0, 1])
    permuted = {
        "lora_a": tensors["lora_a"][order],
        "lora_b": tensors["lora_b"][:, order],
        "lora_lambda": tensors["lora_lambda"][order],
    }
    torch.testing.assert_close(triplet_delta(x, permuted, 1.0), triplet_delta(x, tensors, 1.0))


def test_tensors_have_their_shapes_components_and_first_values() -> None:
    site = Site(name="s", in_features=400, out_features=300, rank=8)
    specs = triplet_tensors(site, lambda_init=zeros)
    assert {n: (s.shape, s.component_axis) for n, s in specs.items()} == {
        "lora_a": ((8, 400), 0),
        "lora_b": ((300, 8), 1),
        "lora_lambda": ((8,), 0),
    }
    for released, wanted in ((False, (0.05, 300**-0.5)), (True, (0.02, 0.02))):
        specs = triplet_tensors(site, lambda_init=zeros, released=released)
        for name, std in zip(("lora_a", "lora_b"), wanted, strict=True):
            values = torch.empty(specs[name].shape)
            specs[name].init(values, torch.Generator().manual_seed(0))
            assert float(values.std()) == pytest.approx(std, rel=0.05)
            assert abs(float(values.mean())) < 0.1 * std


def test_a_component_moves_as_far_in_a_step_as_one_of_loras() -> None:
    site = Site(name="s", in_features=400, out_features=300, rank=8)
    rate = 1e-3

    def moved(specs: dict[str, TensorSpec], moving: str) -> float:
        """Length of the change of dW when Adam's first step moves that tensor alone."""
        w = {name: torch.empty(spec.shape) for name, spec in specs.items()}
        for name, spec in specs.items():
            spec.init(w[name], torch.Generator().manual_seed(0))
        assert not w[moving].any()
        w[moving] += rate * specs[moving].lr_factor
        return float(torch.linalg.norm(w["lora_b"] * w.get("lora_lambda", 1.0) @ w["lora_a"]))

    triplet = triplet_tensors(site, lambda_init=zeros)
    assert moved(triplet, "lora_lambda") == pytest.approx(
        moved(low_rank_pair(site), "lora_b"), rel=0.1
    )
    for lr_factor, released, wanted in ((None, True, 1.0), (2.0, False, 2.0), (2.0, True, 2.0)):
        specs = triplet_tensors(site, lambda_init=zeros, lr_factor=lr_factor, released=released)
        assert specs["lora_lambda"].lr_factor == wanted
        assert specs["lora_a"].lr_factor == specs["lora_b"].lr_factor == 1.0


# --- statistics and scores ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("step", "mean", "spread", "product"),
    [
        (1, 0.15, 0.1275, 0.019125),
        (2, 0.2775, 0.21675, 0.060148),
        (3, 0.385875, 0.276356, 0.106639),
    ],
)
def test_statistics_of_a_constant_importance(
    step: int, mean: float, spread: float, product: float
) -> None:
    got = [float(value) for value in smoothed([torch.ones(())] * step)]
    assert got == pytest.approx([mean, spread, product], abs=1e-6)


def test_each_average_has_a_beta_of_its_own() -> None:
    mean, spread, _ = smoothed([torch.tensor(1.0), torch.tensor(3.0)], beta1=0.5, beta2=0.9)
    assert float(mean) == pytest.approx(0.5 * 0.5 + 0.5 * 3.0)
    # |1 - .5| and |3 - 1.75|: strays from the mean just updated
    assert float(spread) == pytest.approx(0.9 * (0.1 * 0.5) + 0.1 * 1.25)


def test_an_importance_that_never_strays_ends_with_score_zero() -> None:
    mean, _, product = smoothed([torch.ones(())] * 400)
    assert float(mean) == pytest.approx(1.0) and float(product) < 1e-6


def test_scores_of_a_loss_k_times_as_large_are_k_squared_times_as_large() -> None:
    importances = [random(11, seed=s).abs() for s in range(5)]
    *_, scores = smoothed(importances)
    *_, larger = smoothed([8.0 * importance for importance in importances])
    assert torch.equal(larger, 64.0 * scores)


def test_smoothing_two_shards_is_smoothing_the_whole() -> None:
    importances = [random(101, seed=s).abs() for s in range(4)]
    whole = smoothed(importances)
    halves = [smoothed([i[cut] for i in importances]) for cut in (slice(37), slice(37, 101))]
    for stat, first, second in zip(whole, *halves, strict=True):
        assert torch.equal(stat, torch.cat([first, second]))


def test_a_components_score_is_lambdas_and_the_means_of_its_vectors() -> None:
    tensors = {
        f"{site}.{n}": t.abs() for i, site in enumerate("xy") for n, t in components(i).items()
    }
    scores = triplet_scores(WholeScores(tensors))
    assert list(scores) == ["x", "y"]
    for site, score_R in scores.items():
        for i in range(RANK):
            a_I, b_O = tensors[f"{site}.lora_a"][i], tensors[f"{site}.lora_b"][:, i]
            expected = float(tensors[f"{site}.lora_lambda"][i] + a_I.mean() + b_O.mean())
            assert float(score_R[i]) == pytest.approx(expected)


def test_scores_of_all_sites_are_one_collective() -> None:
    class Counting(WholeScores):
        calls = 0

        def sums(self, by):  # type: ignore[no-untyped-def]
            Counting.calls += 1
            return super().sums(by)

    triplet_scores(Counting({f"{s}.{n}": t for s in "xyz" for n, t in components().items()}))
    assert Counting.calls == 1


# --- |dW * dL/dW| ---------------------------------------------------------------------------------


def batch() -> tuple[Tensor, Tensor]:
    return random(2, 6, IN, seed=5), random(2, 6, OUT, seed=6)


def by_autograd(scale: float) -> Tensor:
    """|dW * G| entry by entry, from the gradient of a dense dW."""
    x, grad_y = batch()
    delta_OI = (scale * dense(components())).requires_grad_()
    (grad_OI,) = torch.autograd.grad(x @ delta_OI.t(), delta_OI, grad_y)
    return (delta_OI.detach() * grad_OI).abs().double()


@pytest.mark.parametrize("chunk", [1, 2 * IN, 3 * IN + 1, 10**6])
def test_delta_sensitivity_is_that_of_the_dense_delta_however_cut(
    monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr(triplets, "CHUNK", chunk)
    mean = delta_sensitivity(*batch(), components(), 1.7, power=1.0)
    assert mean.dtype == torch.float64 and mean.shape == ()
    torch.testing.assert_close(mean, by_autograd(1.7).mean(), rtol=1e-5, atol=0.0)


class Largest(TorchDispatchMode):
    """Entries of the largest tensor that was made."""

    entries = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        sizes = [t.numel() for t in tree_leaves(made) if isinstance(t, Tensor)]
        self.entries = max(self.entries, *sizes, 0)
        return made


@pytest.mark.parametrize(
    ("num_out", "num_in", "device", "entries"),
    [(61, 48, "cpu", ceil(61 / 8) * 48), (8192, 8192, "meta", 2**20)],
)
def test_no_more_than_an_eighth_of_a_linear_nor_a_million_entries_are_held_at_a_time(
    num_out: int, num_in: int, device: str, entries: int
) -> None:
    shapes = [(2, num_in), (2, num_out), (2, num_in), (num_out, 2), (2,)]
    x, grad_y, *pair, lambda_R = (random(*s, seed=i).to(device) for i, s in enumerate(shapes))
    tensors = dict(zip(WITHIN, (*pair, lambda_R), strict=True))
    with Largest() as largest:
        mean = delta_sensitivity(x, grad_y, tensors, 1.0, power=1.0)
    assert largest.entries == entries
    if device == "cpu":
        wanted = (dense(tensors) * (grad_y.t() @ x)).abs().double().mean()
        torch.testing.assert_close(mean, wanted, rtol=1e-5, atol=0.0)


def test_the_released_score_is_the_mean_times_the_root_of_the_number_of_entries() -> None:
    mean, released = (delta_sensitivity(*batch(), components(), 1.7, power=p) for p in (1.0, 0.5))
    assert float(released / mean) == pytest.approx((IN * OUT) ** 0.5)


def test_cutting_a_batch_never_lowers_the_delta_sensitivity() -> None:
    x, grad_y = batch()
    whole = delta_sensitivity(x, grad_y, components(), 1.0, power=1.0)
    parts = sum(delta_sensitivity(x[m], grad_y[m], components(), 1.0, power=1.0) for m in (0, 1))
    assert float(parts) > float(whole)


# --- penalties ------------------------------------------------------------------------------------

Norm = Callable[[Tensor], Tensor]


def squared(gram_error: Tensor) -> Tensor:
    return gram_error.pow(2).sum()


def unsquared(gram_error: Tensor) -> Tensor:
    return gram_error.pow(2).sum().sqrt()


def penalty_by_autograd(tensors: Tensors, norm: Norm, weight: float) -> dict[str, Tensor]:
    a_RI, b_OR = (tensors[n].clone().requires_grad_() for n in ("lora_a", "lora_b"))
    eye = torch.eye(len(a_RI))
    loss = weight * (norm(a_RI @ a_RI.t() - eye) + norm(b_OR.t() @ b_OR - eye))
    grads = torch.autograd.grad(loss, [a_RI, b_OR])
    return dict(zip(("lora_a", "lora_b"), grads, strict=True))


def test_penalties_have_the_gradients_of_autograd() -> None:
    tensors = components()
    got = squared_penalty(tensors, weight=0.3)
    torch.testing.assert_close(got, penalty_by_autograd(tensors, squared, 0.3))
    got = released_penalty(tensors, weight=0.3, num_matrices=6)
    torch.testing.assert_close(got, penalty_by_autograd(tensors, unsquared, 0.05))


Penalty = Callable[[Tensors], dict[str, Tensor]]
PENALTIES: list[Penalty] = [
    partial(squared_penalty, weight=0.1),
    partial(released_penalty, weight=0.1, num_matrices=2),
]


@pytest.mark.parametrize("penalty", PENALTIES)
def test_orthonormal_factors_are_left_alone(penalty: Penalty) -> None:
    tensors = {"lora_a": torch.eye(RANK, IN), "lora_b": torch.eye(OUT, RANK)}
    assert all((grad == 0).all() for grad in penalty(tensors).values())


@pytest.mark.parametrize("penalty", PENALTIES)
def test_following_the_penalty_alone_makes_factors_orthonormal(penalty: Penalty) -> None:
    tensors = {name: 0.3 * t for name, t in components().items() if name != "lora_lambda"}
    for _ in range(400):
        tensors = {name: t - 0.1 * penalty(tensors)[name] for name, t in tensors.items()}
    eye = torch.eye(RANK)
    assert float((tensors["lora_a"] @ tensors["lora_a"].t() - eye).norm()) < 0.05
    assert float((tensors["lora_b"].t() @ tensors["lora_b"] - eye).norm()) < 0.05


def test_low_precision_factors_are_penalised_in_fp32() -> None:
    halves = {name: t.bfloat16() for name, t in components().items()}
    got = squared_penalty(halves, weight=0.3)
    assert {grad.dtype for grad in got.values()} == {torch.float32}
    rounded = {name: t.float() for name, t in halves.items()}
    torch.testing.assert_close(got, squared_penalty(rounded, weight=0.3))
