"""The adapter's delta: its gradient with dropout, and dropout that depends on the row alone."""

import pytest
import torch
from torch import nn

from sparse_lora_dist.adapter.dropout import RowSeeds
from sparse_lora_dist.adapter.linear import AdapterLinear
from sparse_lora_dist.base_model import frozen_linear
from sparse_lora_dist.base_model.frozen_linear import FrozenLinear, fast_dtype
from sparse_lora_dist.methods import METHODS, RunContext
from sparse_lora_dist.methods.protocol.form import Site
from sparse_lora_dist.methods.protocol.method import Components, Method

DROPOUT, SCALE = 0.3, 2.0


def layer(seeds: RowSeeds) -> AdapterLinear:
    generator = torch.Generator().manual_seed(0)
    site = Site(name="site", in_features=24, out_features=20, rank=4)
    weight = nn.Parameter(torch.randn(20, 24, generator=generator), requires_grad=False)
    parameters = {
        "lora_a": nn.Parameter(torch.randn(4, 24, generator=generator)),
        "lora_b": nn.Parameter(torch.randn(20, 4, generator=generator)),
    }
    base = FrozenLinear(24, 20, weight, None)
    options = {"alpha": 4 * SCALE, "dropout": DROPOUT, "row_seeds": seeds}
    return AdapterLinear(base, site, Method(name="lora"), parameters, **options)


def seeds(*rows: int, step: int = 1) -> RowSeeds:
    return RowSeeds(seed=0, sequence_length=16, step=step, rows_M=rows)


def inputs(rows: int, tokens: int = 16) -> torch.Tensor:
    return torch.randn(rows, tokens, 24, generator=torch.Generator().manual_seed(2))


def test_gradients_are_those_of_the_dropout_that_forward_had() -> None:
    ours, x = layer(seeds(3, 5)), inputs(2).requires_grad_()
    y = ours(x)
    # A later step, or a recomputed layer, has moved on by the time backward comes.
    mask = ours.row_seeds.keep_mask(x, "site", (3, 5), 1, DROPOUT)
    ours.row_seeds.rows_M, ours.row_seeds.step = (8, 9), 2
    y.square().sum().backward()

    a, b = (p.detach().clone().requires_grad_() for p in (ours.lora_a, ours.lora_b))
    x_ = x.detach().clone().requires_grad_()
    wanted = x_ @ ours.base.weight.t() + SCALE * (x_ * mask) @ a.t() @ b.t()
    wanted.square().sum().backward()
    torch.testing.assert_close(y, wanted)
    pairs = ((x, x_), (ours.lora_a, a), (ours.lora_b, b))
    for got, right in pairs:
        torch.testing.assert_close(got.grad, right.grad)


def test_a_row_has_its_own_dropout_whatever_stands_beside_it() -> None:
    ours, x = layer(seeds()), inputs(2)

    def delta(rows: tuple[int, ...], x: torch.Tensor, step: int = 1) -> torch.Tensor:
        ours.row_seeds.rows_M, ours.row_seeds.step = rows, step
        return ours(x)

    both = delta((3, 5), x)
    torch.testing.assert_close(both[1:], delta((5,), x[1:]))
    torch.testing.assert_close(both[1:, :8], delta((5,), x[1:, :8]))
    assert not torch.allclose(both[1:], delta((3,), x[1:]))
    assert not torch.allclose(both[1:], delta((5,), x[1:], step=2))


def test_the_mask_keeps_the_mean_and_evaluation_drops_nothing() -> None:
    mask = seeds().keep_mask(torch.ones(8, 16, 500), "site", tuple(range(8)), 1, DROPOUT)
    assert set(mask.unique().tolist()) == {0.0, torch.tensor(1.0).div(1 - DROPOUT).item()}
    assert abs(float(mask.mean()) - 1.0) < 0.02
    ours, x = layer(seeds(0)).eval(), inputs(1)
    plain = x @ ours.base.weight.t() + SCALE * x @ ours.lora_a.t() @ ours.lora_b.t()
    torch.testing.assert_close(ours(x), plain)


def gated(values: list[float]) -> AdapterLinear:
    """SoRA's layer, as if trained, with these gates."""
    site = Site(name="site", in_features=24, out_features=20, rank=len(values))
    plan = RunContext(total_steps=10, warmup_steps=0, learning_rate=1e-3, sites=(site,))
    method = METHODS["sora"].build(METHODS["sora"].options(), plan)
    ours = layer(seeds(0, 1))
    parameters = {"lora_a": ours.lora_a, "lora_b": ours.lora_b}
    gates = nn.Parameter(torch.tensor(values))
    return AdapterLinear(
        ours.base,
        site,
        method,
        parameters | {"lora_gate": gates},
        alpha=4 * SCALE,
        dropout=0.0,
        row_seeds=ours.row_seeds,
    )


def test_what_is_left_out_was_nothing_and_gets_no_gradient() -> None:
    """A closed gate that is computed gets one, so it may open again; left out, it never does."""
    outputs, gradients = [], []
    for computed in ((0, 1, 2, 3), (0, 3)):
        ours = gated([0.5, 0.0, 0.0, -1.0])
        ours.set_components(Components(computed=computed, open=2))
        y = ours(inputs(2))
        y.square().sum().backward()
        outputs.append(y)
        gradients.append(ours.lora_gate.grad)
        assert (ours.lora_a.grad[1:3] == 0).all() and (ours.lora_b.grad[:, 1:3] == 0).all()
    torch.testing.assert_close(outputs[0], outputs[1])
    assert (gradients[0] != 0).all()
    assert (gradients[1] != 0).tolist() == [True, False, False, True]
    torch.testing.assert_close(gradients[0][[0, 3]], gradients[1][[0, 3]])


def test_a_site_without_components_adds_nothing() -> None:
    ours = gated([0.0] * 4)
    ours.set_components(Components(computed=(), open=0))
    x = inputs(2).requires_grad_()
    y = ours(x)
    torch.testing.assert_close(y, x @ ours.base.weight.t())
    y.sum().backward()
    assert all((p.grad == 0).all() for p in (ours.lora_a, ours.lora_b, ours.lora_gate))


@pytest.mark.parametrize("has_instructions", [True, False])
def test_bf16_gradients_are_those_of_fp32_with_or_without_instructions_for_it(
    monkeypatch: pytest.MonkeyPatch, has_instructions: bool
) -> None:
    monkeypatch.setattr(frozen_linear, "_cpu_multiplies_bf16", lambda: has_instructions)
    ours = layer(seeds(3, 5)).bfloat16()
    x = inputs(2).bfloat16().requires_grad_()
    y, weights = ours(x), torch.randn(2, 16, 20, generator=torch.Generator().manual_seed(3))
    y.backward(weights.bfloat16())

    # The same numbers and the same dropout, everything else in fp32.
    mask = ours.row_seeds.keep_mask(x, "site", (3, 5), 1, DROPOUT).float()
    a, b, x_ = (t.detach().float().requires_grad_() for t in (ours.lora_a, ours.lora_b, x))
    wanted = x_ @ ours.base.weight.float().t() + (x_ * mask) @ a.t() @ b.t() * SCALE
    wanted.backward(weights.bfloat16().float())
    for got, right in ((x, x_), (ours.lora_a, a), (ours.lora_b, b)):
        assert got.grad.dtype == torch.bfloat16
        assert (got.grad.float() - right.grad).norm() < 0.01 * right.grad.norm()


def test_other_dtypes_are_multiplied_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frozen_linear, "_cpu_multiplies_bf16", lambda: False)
    for dtype in (torch.float32, torch.float16):
        assert fast_dtype(torch.zeros(1, dtype=dtype)) == dtype
    assert fast_dtype(torch.zeros(1, dtype=torch.bfloat16)) == torch.float32
    assert fast_dtype(torch.zeros(1, dtype=torch.bfloat16, device="meta")) == torch.bfloat16
