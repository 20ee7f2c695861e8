"""PST: exactly so many weights are zero, by a score that learns through the mask."""

from math import prod
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparse_lora_dist.adapter.dropout import RowSeeds
from sparse_lora_dist.adapter.linear import AdapterLinear
from sparse_lora_dist.base_model.frozen_linear import FrozenLinear
from sparse_lora_dist.export.weight_change import dense_change
from sparse_lora_dist.methods.protocol.form import WEIGHT, Site
from sparse_lora_dist.methods.protocol.method import Method, RunContext
from sparse_lora_dist.methods.protocol.rewriting import Rewriting, Rewritten, Whole
from sparse_lora_dist.methods.pst import PstOptions, pst
from sparse_lora_dist.methods.shared.bit_masks import pack, unpack

SHAPE = (28, 40)
SITE = Site(name="q", out_features=SHAPE[0], in_features=SHAPE[1], rank=3)
FP64 = torch.float64
ODD: dict[str, Any] = {"pst_beta": 0.7, "pst_alpha1": 0.3, "pst_alpha2": 1.9}
"""Weights that no two terms share."""


def method_of(site: Site = SITE, steps: int = 100, **options: Any) -> Method:
    context = RunContext(total_steps=steps, warmup_steps=0, learning_rate=1e-3, sites=(site,))
    return pst(PstOptions(**options), context)


def random(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=FP64)


def first_values(method: Method) -> dict[str, Tensor]:
    values = {}
    for seed, (key, spec) in enumerate(method.form(SITE).tensors.items()):
        values[key] = torch.empty(spec.shape)
        spec.init(values[key], torch.Generator().manual_seed(seed))
    return values


def trained_values(method: Method) -> dict[str, Tensor]:
    specs = method.form(SITE).tensors.items()
    return {key: random(*spec.shape, seed=i) for i, (key, spec) in enumerate(specs)}


def rewriting_of(method: Method) -> Rewriting:
    assert method.rewriting is not None
    return method.rewriting


def written(method: Method, weight_OI: Tensor, tensors: dict[str, Tensor], step: int) -> Rewritten:
    whole = Whole(
        site=SITE,
        index=0,
        step=step,
        tensors=tensors,
        scale=1.0,
        weight_OI=lambda: weight_OI,
        generator=torch.Generator(),
    )
    return rewriting_of(method).write(whole)


def pruned_by(method: Method, weight_OI: Tensor, tensors: dict[str, Tensor], step: int) -> Tensor:
    return unpack(written(method, weight_OI, tensors, step).tensors["pst_pruned"], SHAPE)


def naive(weight_OI: Tensor, t: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """(W', S), as the paper writes them, with the weights of ``ODD``."""
    changed = weight_OI + 0.7 * (t["pst_u"] @ t["pst_v"])
    ones_O1, ones_1I = torch.ones(SHAPE[0], 1, dtype=FP64), torch.ones(1, SHAPE[1], dtype=FP64)
    lines = t["pst_r"][:, None] @ ones_1I + ones_O1 @ t["pst_c"][None, :]
    return changed, changed.abs() + 0.3 * (t["pst_a"] @ t["pst_b"]) + 1.9 * lines


def test_the_lowest_scores_are_pruned_and_exactly_as_many_as_asked() -> None:
    method = method_of(pst_sparsity=0.37, pst_warmup=0.0, pst_cooldown=0.5, **ODD)
    weight_OI, tensors = random(*SHAPE, seed=9), trained_values(method)
    _, scores = naive(weight_OI, tensors)
    for step, sparsity in ((50, 0.37), (90, 0.37), (25, 0.37 * (1 - 0.5**3))):
        zeros = int(sparsity * prod(SHAPE))
        done = written(method, weight_OI, tensors, step)
        pruned = unpack(done.tensors["pst_pruned"], SHAPE)
        assert int(pruned.sum()) == zeros and done.log_values == {"sparsity": (zeros, prod(SHAPE))}
        assert scores[pruned].max() < scores[~pruned].min()


def test_equal_scores_are_pruned_from_the_highest_index() -> None:
    """Weights in NF4 are one of 16 values a block."""
    method = method_of()
    tied = pruned_by(method, torch.ones(SHAPE), first_values(method), 70).flatten()
    assert tied.nonzero().flatten().tolist() == list(range(prod(SHAPE) // 2, prod(SHAPE)))


def test_at_first_the_ranking_is_by_magnitude_whatever_is_random() -> None:
    method = method_of()
    weight_OI = random(*SHAPE, seed=9).float()
    smallest = weight_OI.abs().flatten().argsort()[: prod(SHAPE) // 2]
    wanted = torch.zeros(prod(SHAPE), dtype=torch.bool)
    wanted[smallest] = True
    values = first_values(method)
    assert values["pst_u"].any() and values["pst_a"].any()
    assert torch.equal(pruned_by(method, weight_OI, values, 70).flatten(), wanted)


@pytest.mark.parametrize("options", [{}, {"pst_initial_sparsity": 0.2, "pst_every": 7}])
def test_masks_are_made_along_a_cubic_curve(options: dict[str, Any]) -> None:
    method = method_of(steps=200, pst_sparsity=0.6, **options)
    initial, every = options.get("pst_initial_sparsity", 0.0), options.get("pst_every", 4)
    at = [step for step in range(201) if rewriting_of(method).at(step)]
    # 20 = 0.1, 140 = 0.7 of the run; nothing is to be pruned before, unless it is told.
    due = {step for step in range(200) if step % every == 0 and (initial or step > 20)}
    assert at == sorted(due | {140})
    tensors = first_values(method)
    for step in at:
        left = 1.0 - min(max(step - 20, 0) / 120, 1.0)
        sparsity = 0.6 + (initial - 0.6) * left**3
        zeros = int(pruned_by(method, random(*SHAPE).float(), tensors, step).sum())
        assert zeros == pytest.approx(sparsity * prod(SHAPE), abs=1.0)


def test_before_the_first_mask_the_delta_is_nothing_and_without_sparsity_low_rank() -> None:
    method = method_of(pst_sparsity=0.0, **ODD)
    assert not any(rewriting_of(method).at(step) for step in range(101))
    form, x = method.form(SITE), random(5, SHAPE[1], seed=3)
    nothing = {k: torch.zeros(s.shape, dtype=s.dtype) for k, s in form.kept.items()}
    based = {WEIGHT: random(*SHAPE, seed=9)} | nothing
    first = {key: t.double() for key, t in first_values(method).items()}
    assert not form.delta(x, first | based, 1.0).any()
    trained = trained_values(method)
    low_rank = 0.7 * x @ trained["pst_v"].t() @ trained["pst_u"].t()
    torch.testing.assert_close(form.delta(x, trained | based, 1.0), low_rank)


def test_delta_and_gradients_are_those_of_the_straight_through_formula() -> None:
    method = method_of(**ODD)
    form, weight_OI = method.form(SITE), random(*SHAPE, seed=9)
    pruned = random(*SHAPE, seed=4) < 0.2
    leaves = {key: t.requires_grad_() for key, t in trained_values(method).items()}
    x = random(2, 5, SHAPE[1], seed=3).requires_grad_()
    y = form.delta(x, leaves | {WEIGHT: weight_OI, "pst_pruned": pack(pruned)}, 1.0)
    changed, scores = naive(weight_OI, leaves)
    # Within brackets: their difference is zero, and no rounding brings back what is pruned.
    mask = (~pruned).double() + (scores - scores.detach())
    wanted = x @ (mask * changed - weight_OI).t()
    torch.testing.assert_close(y, wanted)
    above = random(*y.shape, seed=5)
    ours = torch.autograd.grad(y, [x, *leaves.values()], above)
    theirs = torch.autograd.grad(wanted, [x, *leaves.values()], above)
    for key, mine, other in zip(["x", *leaves], ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, msg=key)
        assert mine.isfinite().all() and mine.any(), key


def test_what_is_pruned_learns_and_comes_back_where_it_is_wanted() -> None:
    method = method_of()
    form, weight_OI = method.form(SITE), random(*SHAPE, seed=9)
    values = {key: t.double() for key, t in first_values(method).items()}
    assert pruned_by(method, weight_OI, values, 70)[:, :5].any()
    # All is pruned, and the loss misses the first five columns.
    kept = {WEIGHT: weight_OI, "pst_pruned": pack(torch.ones(SHAPE, dtype=torch.bool))}
    values["pst_c"].requires_grad_()
    x = torch.eye(SHAPE[1], dtype=FP64)
    y = x @ weight_OI.t() + form.delta(x, values | kept, 1.0)
    assert not y.any()
    wanted = (x @ weight_OI.t()).index_fill(0, torch.arange(5, SHAPE[1]), 0.0)
    (gradient_I,) = torch.autograd.grad((y - wanted).square().sum(), [values["pst_c"]])
    raised = values | {"pst_c": -gradient_I}
    assert (raised["pst_c"][:5] > 0).all() and not raised["pst_c"][5:].any()
    assert not pruned_by(method, weight_OI, raised, 70)[:, :5].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_merged_weight_is_exactly_zero_where_it_is_pruned(dtype: torch.dtype) -> None:
    method = method_of(**ODD)
    form, weight_OI = method.form(SITE), random(*SHAPE, seed=9).to(dtype)
    trained = {key: t.float() for key, t in trained_values(method).items()}
    bits_B = written(method, weight_OI.float(), trained, 70).tensors["pst_pruned"]
    adapter = AdapterLinear(
        FrozenLinear(*SHAPE[::-1], nn.Parameter(weight_OI, requires_grad=False), None),
        SITE,
        method,
        {
            key: nn.Parameter(t, requires_grad=False)
            for key, t in (trained | {"pst_pruned": bits_B}).items()
        },
        alpha=32.0,
        dropout=0.0,
        row_seeds=RowSeeds(seed=0, sequence_length=8),
    )
    tensors = adapter.computed([getattr(adapter, key) for key in form.tensors])
    merged = weight_OI.float() + dense_change(adapter, tensors).change_OI
    pruned = unpack(bits_B, SHAPE)
    assert torch.equal(merged == 0.0, pruned) and int(pruned.sum()) == prod(SHAPE) // 2
    changed, _ = naive(weight_OI.double(), {key: t.double() for key, t in trained.items()})
    torch.testing.assert_close(merged[~pruned], changed[~pruned].float(), rtol=1e-5, atol=1e-5)


def test_a_small_change_of_a_large_weight_is_not_rounded_off_in_bf16() -> None:
    method = method_of()
    form, weight_OI = method.form(SITE), torch.full(SHAPE, 3.0, dtype=torch.bfloat16)
    tensors = {key: t.bfloat16() for key, t in first_values(method).items()}
    tensors["pst_v"] = torch.full_like(tensors["pst_v"], 1e-4)
    kept = {WEIGHT: weight_OI, "pst_pruned": pack(torch.zeros(SHAPE, dtype=torch.bool))}
    y = form.delta(torch.eye(SHAPE[1], dtype=torch.bfloat16), tensors | kept, 1.0)
    wanted = (tensors["pst_u"].double() @ tensors["pst_v"].double()).t()
    torch.testing.assert_close(y.double(), wanted, rtol=0.01, atol=1e-6)


@pytest.mark.parametrize(
    ("out", "wide", "entries"),
    [(768, 768, 26112), (3072, 768, 65280), (4096, 4096, 139264), (11008, 4096, 256768)],
)
def test_parameters_are_those_of_two_pairs_and_two_vectors(
    out: int, wide: int, entries: int
) -> None:
    site = Site(name="q", out_features=out, in_features=wide, rank=8)
    form = method_of(site).form(site)
    assert sum(prod(spec.shape) for spec in form.tensors.values()) == entries
    assert sum(spec.num_bytes for spec in form.kept.values()) == out * wide // 8
    fewer = method_of(site, pst_score_rank=2).form(site).tensors.values()
    assert sum(prod(spec.shape) for spec in fewer) == entries - 6 * (out + wide)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"pst_sparsity": 1.0}, "0 <= initial <= final < 1, got 0.0 and 1.0"),
        ({"pst_initial_sparsity": 0.6}, "0 <= initial <= final < 1, got 0.6 and 0.5"),
        ({"pst_initial_sparsity": -0.1}, "0 <= initial <= final < 1, got -0.1 and 0.5"),
        ({"pst_warmup": -0.1}, "their sum below 1, got -0.1 and 0.3"),
        ({"pst_cooldown": -0.1}, "their sum below 1, got 0.1 and -0.1"),
        ({"pst_warmup": 0.5, "pst_cooldown": 0.5}, "their sum below 1, got 0.5 and 0.5"),
        ({"pst_every": 0}, "pst_every must be at least 1, got 0"),
        ({"pst_score_rank": 0}, "pst_score_rank must be at least 1, got 0"),
        ({"pst_beta": 0.0}, "pst_beta must be above 0, got 0.0"),
        ({"pst_beta": float("nan")}, "pst_beta must be above 0, got nan"),
        ({"pst_alpha1": -1.0}, "pst_alpha1 must be at least 0, got -1.0"),
        ({"pst_alpha2": float("inf")}, "pst_alpha2 must be at least 0, got inf"),
    ],
)
def test_wrong_numbers_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        PstOptions(**options)


def test_all_that_is_wrong_is_said_at_once() -> None:
    with pytest.raises(ValueError, match="--pst_every .*; --pst_beta "):
        PstOptions(pst_every=0, pst_beta=0.0)


def test_a_run_too_short_to_train_with_its_last_mask_is_refused_with_what_works() -> None:
    for steps, options in ((1, {}), (8, {"pst_warmup": 0.9, "pst_cooldown": 0.0})):
        with pytest.raises(ValueError, match=f"run has {steps} steps.* --max_steps") as refusal:
            method_of(steps=steps, **options)
        least = int(str(refusal.value).partition("max_steps ")[2].split()[0])
        masks = rewriting_of(method_of(steps=least, **options))
        assert any(masks.at(step) for step in range(least)) and not masks.at(least)
    assert not rewriting_of(method_of(steps=1, pst_sparsity=0.0)).at(0)
