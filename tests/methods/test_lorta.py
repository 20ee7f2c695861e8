"""LoRTA: every linear's update is a slice of one tensor, whose factors are all that trains."""

from collections.abc import Mapping
from dataclasses import replace
from math import prod
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sparse_lora_dist.methods import METHODS
from sparse_lora_dist.methods.lorta import LortaOptions, lorta, place
from sparse_lora_dist.methods.protocol.form import Site
from sparse_lora_dist.methods.protocol.method import Method, RunContext, trained_specs
from sparse_lora_dist.plan.forecast import forecast
from tests.conftest import Ranks
from tests.fixtures.tiny_run import TinyRun


def site(name: str, out: int, wide: int, rank: int = 5) -> Site:
    return Site(name=name, in_features=wide, out_features=out, rank=rank)


def layered(layers: int, matrices: str, out: int, wide: int, rank: int) -> tuple[Site, ...]:
    names = (f"model.layers.{n}.self_attn.{m}_proj" for n in range(layers) for m in matrices)
    return tuple(site(name, out, wide, rank) for name in names)


def context(*sites: Site) -> RunContext:
    return RunContext(total_steps=10, warmup_steps=0, learning_rate=1e-3, sites=sites)


def build(sites: tuple[Site, ...], heads: int | None = None) -> Method:
    return lorta(LortaOptions(lorta_heads=heads), context(*sites))


def count(sites: tuple[Site, ...], heads: int | None = None) -> int:
    return sum(prod(spec.shape) for spec in trained_specs(build(sites, heads), sites).values())


def random_factors(method: Method, of: Site) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    specs = method.form(of).tensors.items()
    return {key: torch.randn(spec.shape, generator=generator) for key, spec in specs}


def whole_tensor(factors: Mapping[str, Tensor]) -> Tensor:
    """The tensor of five axes: layer, matrix, head, output of a head, input."""
    in_IR, e_ER, h_HR, l_LR, m_MR = (factors[f"lorta_{k}"] for k in ("in", "e", "h", "l", "m"))
    return torch.einsum("lr,mr,hr,er,ir->lmhei", l_LR, m_MR, h_HR, e_ER, in_IR)


def test_every_update_is_its_slice_of_the_tensor() -> None:
    sites = layered(3, "qkv", out=12, wide=7, rank=5)
    method = build(sites, heads=3)
    factors = random_factors(method, sites[0])
    assert [tuple(t.shape) for t in factors.values()] == [(7, 5), (4, 5), (3, 5), (3, 5), (3, 5)]
    updates = whole_tensor(factors)
    for i, of in enumerate(sites):
        form, wanted_OI = method.form(of), 0.7 * updates[i // 3, i % 3].reshape(12, 7)
        assert all(spec.shared for spec in form.tensors.values())
        torch.testing.assert_close(form.delta(torch.eye(7), factors, 0.7).t(), wanted_OI)
        assert form.to_lora is not None
        a_RI, b_OR = form.to_lora(factors)
        assert a_RI.shape == (5, 7) and b_OR.shape == (12, 5)
        torch.testing.assert_close(0.7 * b_OR @ a_RI, wanted_OI)


def test_at_first_there_is_no_update_and_only_the_matrices_factor_has_a_gradient() -> None:
    sites = layered(2, "qo", out=64, wide=400, rank=8)
    form = build(sites, heads=4).form(sites[0])
    factors = {key: torch.empty(spec.shape) for key, spec in form.tensors.items()}
    for i, (key, spec) in enumerate(form.tensors.items()):
        spec.init(factors[key], torch.Generator().manual_seed(i))
    lengths_R = factors["lorta_in"].norm(dim=0)
    assert lengths_R == pytest.approx(torch.ones(8), abs=0.15)
    assert factors["lorta_e"].std() == pytest.approx(1.0, abs=0.2)
    leaves = {key: t.requires_grad_() for key, t in factors.items()}
    y = form.delta(torch.randn(6, 400), leaves, 1.0)
    assert not y.any()
    y.backward(torch.randn(6, 64))
    assert [key for key, t in leaves.items() if t.grad is not None and t.grad.any()] == ["lorta_m"]
    assert not leaves["lorta_m"].grad[1].any(), "this is not the second matrix"


def test_parameters_of_llama_2_7b_are_4292_of_each_rank() -> None:
    assert count(layered(32, "qkvo", 4096, 4096, rank=1)) == 4096 + 128 + 32 + 32 + 4 == 4292
    assert count(layered(32, "qkvo", 4096, 4096, rank=8)) == 8 * 4292


@pytest.mark.parametrize(
    ("out", "wide", "heads"),
    [(768, 768, 12), (3072, 768, 48), (4096, 4096, 32), (11008, 4096, 86), (24, 24, 1)],
)
def test_parameters_of_one_linear_and_the_usual_heads(out: int, wide: int, heads: int) -> None:
    assert count((site("q", out, wide, rank=8),)) == 8 * (wide + out // heads + heads + 1 + 1)


def test_usual_heads_are_the_nearest_that_divide() -> None:
    # 4100 outputs would be 32.03 heads of 128; 25 and 41 divide.
    specs = trained_specs(build((site("q", 4100, 8),)), (site("q", 4100, 8),))
    assert specs["q.lorta_h"].shape == (25, 5)


@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("model.layers.3.self_attn.q_proj", (3, "model.layers.self_attn.q_proj")),
        ("h.11.mlp.experts.5.up", (11, "h.mlp.experts.5.up")),
        ("q", (0, "q")),
        ("7", (7, "")),
        ("lm_head", (0, "lm_head")),
    ],
)
def test_a_place_is_the_first_number_and_the_rest_of_the_name(
    name: str, where: tuple[int, str]
) -> None:
    assert place(site(name, 8, 8)) == where


def test_no_two_linears_have_one_update_whatever_their_names() -> None:
    names = ["encoder.layer.4.q", "decoder.layer.4.q", "decoder.layer.4.cross.q", "pooler", "6"]
    sites = tuple(site(name, 8, 8) for name in names)
    method = build(sites)
    factors = random_factors(method, sites[0])
    # Layers 0, 4, 6 and five matrices.
    assert factors["lorta_l"].shape == (3, 5) and factors["lorta_m"].shape == (5, 5)
    updates = [method.form(of).delta(torch.eye(8), factors, 1.0) for of in sites]
    for i, one in enumerate(updates):
        assert not any(torch.allclose(one, other) for other in updates[:i])


def test_linears_of_several_shapes_are_refused_with_names_that_work() -> None:
    wide = tuple(replace(s, out_features=32) for s in layered(2, "kv", 64, 64, 4))
    most = layered(3, "qo", 64, 64, 4)
    with pytest.raises(ValueError, match=r"one shape, got 32 x 64 \(.*0\.self_attn\.k_proj\), 64"):
        build((*wide, *most))
    with pytest.raises(ValueError, match=r"--target_modules q_proj,o_proj$"):
        build((*wide, *most))
    bert = [
        site(f"encoder.layer.{n}.{name}", out, wide)
        for n in range(2)
        for name, out, wide in (
            ("attention.query", 8, 8),
            ("attention.output.dense", 8, 8),
            ("intermediate.dense", 16, 8),
            ("output.dense", 8, 16),
        )
    ]
    with pytest.raises(ValueError, match=r"--target_modules query,attention\.output\.dense$"):
        build(tuple(bert))


@pytest.mark.parametrize(("heads", "near"), [(5, "4 and 6"), (13, "8 and 12"), (100, "12 and 24")])
def test_heads_that_do_not_divide_are_refused_with_those_that_do(heads: int, near: str) -> None:
    said = f"lorta_heads {heads} does not divide the 24 outputs of q\\. .* do are {near}"
    with pytest.raises(ValueError, match=said):
        build((site("q", 24, 24),), heads)


def test_no_heads_are_refused() -> None:
    with pytest.raises(ValueError, match="lorta_heads must be at least 1, got 0"):
        LortaOptions(lorta_heads=0)


def test_the_planner_may_ask_of_other_linears() -> None:
    sites = layered(2, "qo", 96, 96, 4)
    live = forecast(METHODS["lorta"], LortaOptions(lorta_heads=32), context(*sites)).on(2)
    assert (live.first, live.last) == (1.0, 1.0)
    other = site("model.layers.9.mlp.up_proj", 200, 50)
    form = build(sites, heads=32).form(other)
    assert form.delta(torch.zeros(3, 50), random_factors(build(sites, 32), other), 1.0).shape == (
        3,
        200,
    )


def test_a_real_model_trains_its_five_factors(ranks: Ranks, tiny: TinyRun, tmp_path: Path) -> None:
    options: dict[str, object] = {"method": "lorta", "rank": 4, "max_steps": 1}
    for said in ranks(1, "tests.work.run:refusal_unread", flags=tiny.flags(tmp_path, **options)):
        assert "--method lorta: all linears must have one shape, got 64 x 64" in said
        assert "--target_modules q_proj,o_proj" in said
    options |= {"target_modules": "q_proj,o_proj", "lorta_heads": 4}
    (said,) = ranks(1, "tests.work.run:train", flags=tiny.flags(tmp_path, **options))
    assert f"4 linears, {4 * (64 + 16 + 4 + 2 + 2):,} trained parameters" in said
