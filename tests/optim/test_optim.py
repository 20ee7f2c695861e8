"""SparseAdamW against torch's own AdamW, and what it keeps of entries that are dead."""

import gc
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

from sparse_lora_dist.methods.protocol.form import Update
from sparse_lora_dist.optim.moments import MOMENTS
from sparse_lora_dist.optim.sparse_adamw import SparseAdamW

N, LR, DECAY, BETA2, EPS = 500, 1e-2, 0.1, 0.999, 1e-8
ALL = torch.ones(N, dtype=torch.bool)
NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NO_GPU])]
"""Where bitsandbytes' kernels differ: the CPU's rounds nothing to zero."""


def start(n: int = N) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(0)).requires_grad_()


def gradients(steps: int, n: int = N, seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, generator=generator) for _ in range(steps)]


def every_third_dies() -> Tensor:
    return torch.arange(N) % 3 != 0


def sparse(flat: Tensor, live: Tensor, *, eight_bit: bool = False, **group: Any) -> SparseAdamW:
    groups = [{"params": [flat], "weight_decay": DECAY} | group]
    optimizer = SparseAdamW(groups, lr=LR, weight_decay=0.0, eight_bit=eight_bit)
    optimizer.set_live(flat, live)
    return optimizer


def adamw(flat: Tensor, weight_decay: float = DECAY) -> torch.optim.AdamW:
    return torch.optim.AdamW([flat], lr=LR, weight_decay=weight_decay, foreach=False)


def train(flat: Tensor, optimizer: torch.optim.Optimizer, grads: Iterable[Tensor]) -> None:
    for grad in grads:
        flat.grad = grad.to(flat.device, copy=True)
        optimizer.step()


def kept(optimizer: SparseAdamW, flat: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """All that a restart is given, besides the count of steps."""
    exp_avg, exp_avg_sq = (optimizer.dense(flat, key) for key in MOMENTS)
    return optimizer.live(flat), exp_avg, exp_avg_sq, optimizer.born(flat)


def stored(optimizer: SparseAdamW, flat: Tensor) -> list[Tensor]:
    """Every tensor that the state of a shard holds."""
    tensors = []
    for chunk in optimizer.state[flat]["chunks"]:
        tensors += [chunk.bits, *chunk.exp_avg.tensors, *chunk.exp_avg_sq.tensors]
        tensors += [] if chunk.birth_L is None else [chunk.birth_L]
    return tensors


@pytest.mark.parametrize("weight_decay", [0.0, DECAY])
def test_equals_torch_adamw_bit_for_bit_while_everything_lives(weight_decay: float) -> None:
    ours, theirs = start(), start()
    optimizer, reference = sparse(ours, ALL, weight_decay=weight_decay), adamw(theirs, weight_decay)
    for step, grad in enumerate(gradients(7)):
        for group in (*optimizer.param_groups, *reference.param_groups):
            group["lr"] = LR / (step + 1)
        train(ours, optimizer, [grad])
        train(theirs, reference, [grad])
        assert torch.equal(ours, theirs)
    for key in MOMENTS:
        assert torch.equal(optimizer.dense(ours, key), reference.state[theirs][key])


def test_dead_entries_hold_their_value_and_live_ones_step_as_if_alone() -> None:
    ours, theirs, live = start(), start(), every_third_dies()
    optimizer = sparse(ours, live)
    train(ours, optimizer, gradients(3))
    train(theirs, adamw(theirs), gradients(3))
    assert torch.equal(ours[~live], start()[~live])
    assert torch.equal(ours[live], theirs[live])


def test_what_a_step_is_to_zero_is_zero_once_and_only_the_living_move_again() -> None:
    flat, live, zero = start(), every_third_dies(), torch.arange(N) % 2 == 0
    plain = start()
    optimizer, reference = sparse(flat, live), sparse(plain, live)
    optimizer.zero_after_step(flat, zero & (torch.arange(N) < 100))
    optimizer.zero_after_step(flat, zero & (torch.arange(N) >= 100))
    first, second = gradients(2)
    train(flat, optimizer, [first])
    train(plain, reference, [first])
    assert torch.equal(flat, plain.masked_fill(zero, 0.0))
    for key in MOMENTS:
        assert torch.equal(optimizer.dense(flat, key), reference.dense(plain, key))
    train(flat, optimizer, [second])
    assert (flat[zero & ~live] == 0).all()
    assert (flat[zero & live] != 0).all()


def test_state_is_packed_to_the_live_entries() -> None:
    n = 20_001
    flat, live = start(n), torch.arange(n) % 20 == 3
    optimizer = sparse(flat, live)
    train(flat, optimizer, gradients(2, n))
    count = int(live.sum())
    assert optimizer.num_live() == count
    assert optimizer.state_bytes().now == 8 * count + -(-n // 8)
    storages = [t.untyped_storage() for t in stored(optimizer, flat)]
    assert len({s.data_ptr() for s in storages}) == len(storages)
    assert sum(s.nbytes() for s in storages) == optimizer.state_bytes().now
    assert torch.equal(optimizer.live(flat), live)
    dense = optimizer.dense(flat, "exp_avg")
    assert (dense[~live] == 0).all() and (dense[live] != 0).all()


def test_memory_of_the_dead_is_returned_and_its_peak_is_known(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sparse_lora_dist.optim.sparse_adamw.CHUNK", 256)
    flat = start()
    optimizer = sparse(flat, ALL)
    bits, few = -(-N // 8), torch.arange(N) % 25 == 0
    assert optimizer.state_bytes().now == optimizer.state_bytes().peak == 8 * N + bits
    optimizer.set_live(flat, ALL)
    # Spread out, an entry has a bit's byte, two moments and a birth.
    before, both = optimizer.state_bytes(), 8 * N + bits + 13 * 256 + 8 * 256 + 256 // 8
    assert before.repacking == both, "old, spread and new of one chunk, not of the shard"
    old = [weakref.ref(t.untyped_storage()) for t in stored(optimizer, flat)]
    optimizer.set_live(flat, few)
    gc.collect()
    assert not any(ref() for ref in old)
    after = optimizer.state_bytes()
    assert after.now == 8 * int(few.sum()) + bits
    assert (after.peak, after.repacking) == (before.peak, both)


def test_survivors_keep_moments_and_birth_and_the_newborn_start_at_zero() -> None:
    flat, first = start(), every_third_dies()
    second = torch.arange(N) % 4 != 1
    optimizer = sparse(flat, first)
    train(flat, optimizer, gradients(2))
    _, *before, _ = kept(optimizer, flat)
    optimizer.set_live(flat, second)
    live, *after, born = kept(optimizer, flat)
    assert torch.equal(live, second)
    for old, new in zip(before, after, strict=True):
        assert torch.equal(new, torch.where(first & second, old, 0.0))
    assert torch.equal(born, 2 * (second & ~first).int())


def test_a_newborn_steps_like_an_adamw_that_starts_at_its_birth() -> None:
    """With one step count for all, its first update would be 3.8 times as large."""
    ours, old, new = start(), start(), start()
    newborn = ~every_third_dies()
    optimizer = sparse(ours, ~newborn)
    grads = gradients(30)
    train(ours, optimizer, grads[:20])
    optimizer.set_live(ours, ALL)
    train(ours, optimizer, grads[20:21])
    plain = start()[newborn] * (1 - LR * DECAY)
    moved = (ours[newborn] - plain).abs()
    assert torch.allclose(moved, torch.full_like(moved, LR), rtol=1e-4)
    train(ours, optimizer, grads[21:])
    train(old, adamw(old), grads)
    train(new, adamw(new), grads[20:])
    torch.testing.assert_close(ours, torch.where(newborn, new, old), rtol=1e-6, atol=1e-6)


def test_a_newborn_warms_up_by_its_own_rate() -> None:
    def rate(born: int) -> float:
        return LR if born == 0 else LR * (optimizer.state[flat]["step"] - born) / 4

    flat, newborn = start(), ~every_third_dies()
    optimizer = sparse(flat, ~newborn, rate=rate, lr_factor=0.5)
    train(flat, optimizer, gradients(3))
    optimizer.set_live(flat, ALL)
    for age in (1, 2):
        before = flat.detach().clone()
        train(flat, optimizer, [torch.ones(N)])
        lr = LR / 2 * age / 4
        want = before * (1 - lr * DECAY) - lr
        torch.testing.assert_close(flat[newborn], want[newborn], rtol=0, atol=1e-6)


def test_births_cost_two_bytes_while_they_differ_and_nothing_when_they_agree_again() -> None:
    flat, first, bits = start(), every_third_dies(), -(-N // 8)
    optimizer = sparse(flat, first)
    train(flat, optimizer, gradients(1))
    optimizer.set_live(flat, ALL)
    assert optimizer.state_bytes().now == (8 + 2) * N + bits
    optimizer.set_live(flat, ~first)
    assert optimizer.state_bytes().now == 8 * int((~first).sum()) + bits
    assert (optimizer.born(flat) == (~first).int()).all()


def shrink(w: Tensor, update: Update) -> Tensor:
    return w.sign() * (w.abs() - update.denominator.reciprocal() * update.lr * 0.1).clamp(min=0)


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = every_third_dies(), torch.arange(N) % 2 == 0
    first[:256], first[256:400] = True, False  # chunks that live whole, in part, and not at all
    second[256:384] = False
    seen = []
    for chunk in (N, 64):
        monkeypatch.setattr("sparse_lora_dist.optim.sparse_adamw.CHUNK", chunk)
        flat = start()
        optimizer = sparse(flat, first, rate=lambda born: LR / (1 + born), project=shrink)
        for live, steps in ((first | second, 2), (second, 3), (first | second, 2)):
            train(flat, optimizer, gradients(steps))
            optimizer.set_live(flat, live)
            optimizer.zero_after_step(flat, ~live)
        train(flat, optimizer, gradients(2))
        assert optimizer.born(flat).unique().tolist() == [0, 2, 7]
        seen.append([flat.detach(), *kept(optimizer, flat)])
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))


def test_projection_gets_the_stepped_live_entries_with_rate_and_denominator() -> None:
    flat, plain, live, seen = start(), start(), every_third_dies(), []

    def note(w: Tensor, update: Update) -> Tensor:
        seen.append((w.clone(), update))
        return w + 1.0

    optimizer = sparse(flat, live, lr_factor=2.0, project=note)
    reference = sparse(plain, live, lr_factor=2.0)
    (grad,) = gradients(1)
    train(flat, optimizer, [grad])
    train(plain, reference, [grad])
    [(w, update)] = seen
    assert torch.equal(w, plain[live])
    assert (update.step, update.lr) == (1, 2 * LR)
    torch.testing.assert_close(update.denominator, grad[live].abs() + EPS)
    assert torch.equal(flat[live], plain[live] + 1.0)
    assert torch.equal(flat[~live], start()[~live])


def test_projection_gets_a_rate_and_a_denominator_of_each_entrys_own_age() -> None:
    flat, newborn, seen = start(), ~every_third_dies(), []

    def note(w: Tensor, update: Update) -> Tensor:
        seen.append(update)
        return w

    optimizer = sparse(flat, ~newborn, rate=lambda born: LR / (1 + born), project=note)
    first, second = gradients(2)
    train(flat, optimizer, [first])
    optimizer.set_live(flat, ALL)
    train(flat, optimizer, [second])
    v_old = (BETA2 * first**2 + second**2) * (1 - BETA2) / (1 - BETA2**2)
    want = torch.where(newborn, second.abs(), v_old.sqrt()) + EPS
    torch.testing.assert_close(seen[1].denominator, want)
    torch.testing.assert_close(seen[1].lr, torch.where(newborn, LR / 2, LR))
    assert seen[1].step == 2


def test_groups_have_their_own_rate_decay_and_projection_when_stepped_one_by_one() -> None:
    flats, refs = [start(), start()], [start(), start()]
    settings: list[dict[str, Any]] = [
        {"lr_factor": 1.0, "weight_decay": DECAY},
        {"lr_factor": 16.0, "weight_decay": 0.0, "project": lambda w, update: w.clamp(min=0)},
    ]
    groups = [{"params": [start()]} | setting for setting in settings]
    optimizer = SparseAdamW(groups, lr=LR, weight_decay=0.5)
    for group in optimizer.param_groups:
        group["params"] = []
    for group, flat, grad in zip(optimizer.param_groups, flats, gradients(2), strict=True):
        optimizer.set_live(flat, ALL)
        group["params"] = [flat]
        train(flat, optimizer, [grad])
        group["params"] = []
    for ref, factor, decay, grad in zip(refs, (1, 16), (DECAY, 0.0), gradients(2), strict=True):
        reference = torch.optim.AdamW([ref], lr=LR * factor, weight_decay=decay, foreach=False)
        train(ref, reference, [grad])
    assert torch.equal(flats[0], refs[0])
    assert torch.equal(flats[1], refs[1].clamp(min=0))


def test_reset_moments_is_a_fresh_start_from_the_same_weights() -> None:
    flat, live, newborn = start(), every_third_dies(), torch.arange(N) % 9 == 0
    optimizer = sparse(flat, live)
    train(flat, optimizer, gradients(4))
    optimizer.set_live(flat, live | newborn)
    fresh = flat.detach().clone().requires_grad_()
    optimizer.reset_moments(flat, torch.ones(N, dtype=torch.bool))
    assert torch.equal(optimizer.born(flat), 4 * (live | newborn).int())
    train(flat, optimizer, gradients(3, seed=2))
    train(fresh, sparse(fresh, live | newborn), gradients(3, seed=2))
    assert torch.equal(flat, fresh)


def test_moments_that_are_not_reset_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparse_lora_dist.optim.sparse_adamw.CHUNK", 264)
    flat, live, which = start(), every_third_dies(), torch.arange(N) >= N // 2
    optimizer = sparse(flat, live)
    train(flat, optimizer, gradients(4))
    before = {key: optimizer.dense(flat, key) for key in ("exp_avg", "exp_avg_sq")}
    optimizer.reset_moments(flat, which)
    for key, moment in before.items():
        assert moment[which].any() and torch.equal(optimizer.dense(flat, key), moment * ~which)
    assert torch.equal(optimizer.born(flat), 4 * (live & which).int())


@pytest.mark.parametrize("eight_bit", [False, True])
def test_a_restored_shard_goes_on_bit_for_bit(
    monkeypatch: pytest.MonkeyPatch, eight_bit: bool
) -> None:
    monkeypatch.setattr("sparse_lora_dist.optim.sparse_adamw.CHUNK", 264)
    flat, live = start(), every_third_dies()
    optimizer = sparse(flat, live, eight_bit=eight_bit)
    train(flat, optimizer, gradients(3))
    optimizer.set_live(flat, torch.arange(N) % 5 != 0)
    train(flat, optimizer, gradients(3, seed=2))
    again = flat.detach().clone().requires_grad_()
    second = sparse(again, torch.zeros(N, dtype=torch.bool), eight_bit=eight_bit)
    second.restore(again, *kept(optimizer, flat), steps=6)
    pairs = zip(stored(optimizer, flat), stored(second, again), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    for one, shard in ((optimizer, flat), (second, again)):
        train(shard, one, gradients(3, seed=3))
    assert torch.equal(flat, again)


def spread_gradients(steps: int, n: int) -> list[Tensor]:
    """Sizes from 1e-6 to 1 in one block, signs that mostly persist."""
    size = 10.0 ** (-6 * torch.rand(n, generator=torch.Generator().manual_seed(5)))
    return [size * (1 + grad) for grad in gradients(steps, n)]


def test_eight_bit_moments_stay_close_to_those_of_32_bits() -> None:
    n, steps = 3000, 20
    flats = [start(n), start(n)]
    live = torch.arange(n) % 3 != 0
    for flat, eight_bit in zip(flats, (False, True), strict=True):
        optimizer = sparse(flat, live, eight_bit=eight_bit, weight_decay=0.0)
        train(flat, optimizer, gradients(steps, n))
    moved, error = flats[0] - start(n), flats[1] - flats[0]
    assert error.norm() < 0.05 * moved.norm()
    assert torch.equal(flats[0][~live], flats[1][~live])


@pytest.mark.parametrize("device", DEVICES)
def test_eight_bit_updates_stay_bounded_where_a_block_has_gradients_of_all_sizes(
    device: str,
) -> None:
    flat = start(256).detach().to(device).requires_grad_()
    optimizer = sparse(flat, torch.ones(256, dtype=torch.bool), eight_bit=True)
    grads = spread_gradients(5, 256)
    train(flat, optimizer, grads)
    before = flat.detach().clone()
    train(flat, optimizer, [torch.zeros(256)])
    assert (flat - before).abs().max() < 3 * LR


def test_eight_bit_state_is_two_bytes_an_entry_and_its_scales() -> None:
    n = 10_000
    flat, live = start(n), torch.arange(n) % 2 == 0
    optimizer = sparse(flat, live, eight_bit=True)
    train(flat, optimizer, gradients(2, n))
    blocks = -(-5000 // 256)
    assert optimizer.state_bytes().now == 2 * 5000 + 2 * 4 * blocks + n // 8
    assert sum(t.untyped_storage().nbytes() for t in stored(optimizer, flat)) == (
        optimizer.state_bytes().now
    )


@pytest.mark.parametrize("device", DEVICES)
def test_restoring_eight_bit_moments_reproduces_their_bytes(device: str) -> None:
    n = 20_000
    flat, born = start(n).detach().to(device).requires_grad_(), torch.arange(n) % 7 == 0
    optimizer = sparse(flat, ~born, eight_bit=True)
    train(flat, optimizer, spread_gradients(5, n))
    optimizer.set_live(flat, torch.ones(n, dtype=torch.bool))
    for grads in ([], spread_gradients(1, n)):
        train(flat, optimizer, grads)
        before = stored(optimizer, flat)
        optimizer.restore(flat, *kept(optimizer, flat), steps=optimizer.state[flat]["step"])
        assert all(torch.equal(a, b) for a, b in zip(before, stored(optimizer, flat), strict=True))


def test_zero_moments_are_zero_in_eight_bits() -> None:
    flat, newborn = start(), ~every_third_dies()
    optimizer = sparse(flat, ~newborn, eight_bit=True)
    train(flat, optimizer, gradients(3))
    optimizer.set_live(flat, ALL)
    for key in MOMENTS:
        assert torch.equal(optimizer.dense(flat, key) == 0, newborn)


@pytest.mark.parametrize("eight_bit", [False, True])
@pytest.mark.parametrize("n", [0, 1, 7, 9])
def test_a_tiny_shard_works(n: int, eight_bit: bool) -> None:
    flat, plain = start(n), start(n)
    live: Callable[[int], Tensor] = lambda k: torch.arange(n) < k  # noqa: E731
    optimizer = sparse(flat, live(n), eight_bit=eight_bit)
    reference = adamw(plain)
    for grad in gradients(2, n):
        train(flat, optimizer, [grad])
        train(plain, reference, [grad])
    torch.testing.assert_close(flat, plain, rtol=0, atol=0.1 * LR if eight_bit else 0)
    for k in (0, n):
        optimizer.set_live(flat, live(k))
        assert torch.equal(optimizer.live(flat), live(k)) and optimizer.num_live() == k
        train(flat, optimizer, gradients(1, n))
        optimizer.restore(flat, *kept(optimizer, flat), steps=3)
