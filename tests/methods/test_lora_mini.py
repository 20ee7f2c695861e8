"""LoRA-Mini: the outer factors are the same at every use and on every device, and never kept."""

import pytest
import torch

from sparse_lora_dist.methods.lora_mini import LoraMiniOptions, lora_mini
from sparse_lora_dist.methods.protocol.form import Site
from sparse_lora_dist.methods.protocol.method import RunContext

SITE = Site(name="q", in_features=400, out_features=280, rank=4)
PLAN = RunContext(total_steps=10, warmup_steps=0, learning_rate=1e-3, sites=(SITE,))
CPU = torch.device("cpu")


def test_few_parameters_train_and_the_rest_is_drawn() -> None:
    form = lora_mini(LoraMiniOptions(lora_mini_size=16), PLAN).form(SITE)
    assert {name: spec.shape for name, spec in form.tensors.items()} == {
        "lora_a": (4, 16),
        "lora_b": (16, 4),
    }
    first, second = form.drawn(3, CPU), form.drawn(3, CPU)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["aux_a"], form.drawn(4, CPU)["aux_a"])
    # Like LoRA's A, and of the size that keeps what comes through.
    assert float(first["aux_a"].abs().max()) <= 400**-0.5
    assert float(first["aux_b"].var()) == pytest.approx(1 / 16, rel=0.05)


def test_the_change_is_the_product_of_all_four() -> None:
    form = lora_mini(LoraMiniOptions(lora_mini_size=16), PLAN).form(SITE)
    tensors = form.drawn(3, CPU) | {n: torch.randn(s.shape) for n, s in form.tensors.items()}
    change_OI = form.delta(torch.eye(400), tensors, 0.5).t()
    product = tensors["aux_b"] @ tensors["lora_b"] @ tensors["lora_a"] @ tensors["aux_a"]
    torch.testing.assert_close(change_OI, 0.5 * product)
    assert torch.linalg.matrix_rank(change_OI.double(), rtol=1e-5) == 4


def test_no_inner_size_is_refused() -> None:
    with pytest.raises(ValueError, match="lora_mini_size must be at least 1, got 0"):
        LoraMiniOptions(lora_mini_size=0)
