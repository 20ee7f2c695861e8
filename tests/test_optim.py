"""SparseAdamW against torch's own AdamW, and what it keeps of entries that are dead."""

import pytest
import torch
from torch import Tensor

from sparse_lora_dist.optim import SparseAdamW

N, LR = 500, 1e-2


def sparse(flat: Tensor, weight_decay: float = 0.0, project=lambda w, lr: w) -> SparseAdamW:
    return SparseAdamW([flat], lr=LR, weight_decay=weight_decay, project=project)


def gradients(steps: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(N, generator=generator) for _ in range(steps)]


def start() -> Tensor:
    return torch.randn(N, generator=torch.Generator().manual_seed(0)).requires_grad_()


def every_third_dies() -> Tensor:
    return torch.arange(N) % 3 != 0


def steps(flat: Tensor, optimizer: torch.optim.Optimizer, grads: list[Tensor]) -> None:
    for grad in grads:
        flat.grad = grad.clone()
        optimizer.step()


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_equals_torch_adamw_bit_for_bit_while_everything_lives(weight_decay: float) -> None:
    ours, theirs = start(), start()
    optimizer = sparse(ours, weight_decay)
    optimizer.set_live(ours, torch.ones(N, dtype=torch.bool))
    reference = torch.optim.AdamW([theirs], lr=LR, weight_decay=weight_decay, foreach=False)
    for step, grad in enumerate(gradients(7)):
        for group in (*optimizer.param_groups, *reference.param_groups):
            group["lr"] = LR / (step + 1)
        steps(ours, optimizer, [grad])
        steps(theirs, reference, [grad])
        assert torch.equal(ours, theirs)
    for key in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(optimizer.dense(ours, key), reference.state[theirs][key])


def test_dead_entries_are_exactly_zero_and_live_ones_step_as_if_alone() -> None:
    ours, theirs, live = start(), start(), every_third_dies()
    optimizer = sparse(ours, weight_decay=0.1)
    optimizer.set_live(ours, live)
    reference = torch.optim.AdamW([theirs], lr=LR, weight_decay=0.1, foreach=False)
    steps(ours, optimizer, gradients(3))
    steps(theirs, reference, gradients(3))
    assert (ours[~live] == 0).all()
    assert torch.equal(ours[live], theirs[live])


def test_moments_are_packed_to_the_live_entries() -> None:
    flat, live = start(), every_third_dies()
    optimizer = sparse(flat)
    optimizer.set_live(flat, live)
    steps(flat, optimizer, gradients(1))
    assert optimizer.num_live() == int(live.sum())
    assert optimizer.state[flat]["exp_avg"].shape == (int(live.sum()),)
    assert optimizer.state_bytes() == 2 * 4 * int(live.sum())
    dense = optimizer.dense(flat, "exp_avg")
    assert (dense[~live] == 0).all() and (dense[live] != 0).all()


def test_a_new_mask_keeps_the_moments_of_survivors_and_starts_the_revived_at_zero() -> None:
    flat, first = start(), every_third_dies()
    second = torch.arange(N) % 4 != 1
    optimizer = sparse(flat)
    optimizer.set_live(flat, first)
    steps(flat, optimizer, gradients(2))
    before = optimizer.dense(flat, "exp_avg"), optimizer.dense(flat, "exp_avg_sq")
    optimizer.set_live(flat, second)
    for old, key in zip(before, ("exp_avg", "exp_avg_sq"), strict=True):
        new = optimizer.dense(flat, key)
        assert torch.equal(new[first & second], old[first & second])
        assert (new[second & ~first] == 0).all()
        assert (new[~second] == 0).all()
    assert optimizer.state[flat]["step"] == 2, "bias correction goes on"
    steps(flat, optimizer, gradients(1))
    assert (flat[~second] == 0).all()
    assert (flat[second & ~first] != 0).all(), "a revived entry trains"


def test_projection_sees_the_stepped_live_entries_and_the_learning_rate() -> None:
    flat, plain, live = start(), start(), every_third_dies()
    seen = []

    def shrink(w: Tensor, lr: float) -> Tensor:
        seen.append((w.numel(), lr))
        return w.sign() * (w.abs() - 10 * lr).clamp(min=0)

    optimizer, reference = sparse(flat, project=shrink), sparse(plain)
    optimizer.set_live(flat, live)
    reference.set_live(plain, live)
    steps(flat, optimizer, gradients(1))
    steps(plain, reference, gradients(1))
    assert seen == [(int(live.sum()), LR)]
    assert torch.equal(flat, plain.sign() * (plain.abs() - 10 * LR).clamp(min=0))
    assert (flat[live] == 0).any()


def test_stepping_in_chunks_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, cut, live = start(), start(), every_third_dies()
    live[:200] = True  # chunks that live whole, in part, and not at all
    live[300:400] = False
    for flat, chunk in ((whole, N), (cut, 64)):
        monkeypatch.setattr("sparse_lora_dist.optim.CHUNK", chunk)
        optimizer = sparse(flat, weight_decay=0.1, project=lambda w, lr: w * 0.99)
        optimizer.set_live(flat, live)
        steps(flat, optimizer, gradients(4))
    assert torch.equal(whole, cut)
    assert (cut[~live] == 0).all() and (cut[live] != 0).all()
