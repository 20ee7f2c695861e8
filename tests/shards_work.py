"""What workers run for ``test_zero3_contract.py``: masks and moments over the flat shards."""

from math import prod

import torch
from torch import Tensor

from sparse_lora_dist import comm
from sparse_lora_dist.methods.base import Method, Scores, Stats
from sparse_lora_dist.optim import SparseAdamW
from sparse_lora_dist.shards import Shards
from sparse_lora_dist.zero3 import Engine
from tests.toy_engine import (
    DECAY,
    LR,
    SHAPES,
    coefficients,
    initial,
    inputs,
    live_copy,
    own_part,
    toys,
    whole_masters,
)
from tests.whole_score import WholeScore


def sparse_training() -> list[int]:
    """Masks from a method's decision, against AdamW on whole tensors in one process; entries that
    live on this rank after the decision, in each case."""
    counts = []
    method = Method(
        name="halves",
        n_stats=1,
        observe=lambda stats, w, grad: (stats[0] * 0.5 + (w * grad).abs(),),
        decides_at=lambda step: step in (2, 4),
        decide=_halve_then_revive,
    )
    for engine, optimizer, _ in toys():
        adapters = {p.name for p in engine.slices if "wide" not in p.name}
        shards = Shards(engine, optimizer, method, adapters=adapters)
        reference = Reference(method, adapters)
        for step in range(1, 6):
            x_R1 = inputs(1) + step
            engine.backward(engine(x=x_R1[comm.rank(), 0]))
            shards.observe()
            shards.decide(step)
            engine.step()
            reference.step(step, x_R1.mean())
            _compare_shards(engine, optimizer, shards, reference)
            if step == 3:
                counts.append(optimizer.num_live())
    return counts


def _halve_then_revive(step: int, scores: Scores) -> dict[str, Tensor]:
    if step == 4:
        everything = torch.ones(1, dtype=torch.bool)
        return {name: score.spread(everything, "tensor") for name, score in scores.items()}
    return {name: s.top_k(max(1, prod(s.shape) // 2), "tensor") for name, s in scores.items()}


class Reference:
    """The same training on whole tensors: AdamW as torch has it, masked by hand."""

    def __init__(self, method: Method, adapters: set[str]) -> None:
        self.method = method
        self.w = {f"parts.{n}.weight": initial(s).clone() for n, s in SHAPES.items()}
        self.stats: dict[str, Stats] = {n: (torch.zeros_like(self.w[n]),) for n in adapters}
        self.live = {n: torch.ones_like(w, dtype=torch.bool) for n, w in self.w.items()}
        self.optimizer = torch.optim.AdamW(self.w.values(), lr=LR, weight_decay=DECAY)

    def step(self, step: int, x: Tensor) -> None:
        for name, w in self.w.items():
            w.grad = coefficients(tuple(w.shape)) * x
            if name in self.stats:
                self.stats[name] = self.method.observe(self.stats[name], w, w.grad)
        if self.method.decides_at(step):
            scores = {name: WholeScore(stats[0]) for name, stats in self.stats.items()}
            self._mask(self.method.decide(step, scores))
        for name, w in self.w.items():
            w.grad = coefficients(tuple(w.shape)) * x * self.live[name]
        self.optimizer.step()
        for name, w in self.w.items():
            w.mul_(self.live[name])

    def _mask(self, masks: dict[str, Tensor]) -> None:
        for name, mask in masks.items():
            self.live[name] = mask.view(self.w[name].shape)
            for key in ("exp_avg", "exp_avg_sq"):
                self.optimizer.state[self.w[name]][key].mul_(self.live[name])


def _compare_shards(
    engine: Engine, optimizer: SparseAdamW, shards: Shards, reference: Reference
) -> None:
    masters, live_copies = whole_masters(engine), live_copy(engine)
    moments = {key: shards.moments(key) for key in ("exp_avg", "exp_avg_sq")}
    live = shards.live()
    for piece in engine.slices:
        name, mask = piece.name, reference.live[piece.name]
        assert torch.equal(live[name], own_part(piece, mask)), name
        assert (masters[name][~mask] == 0).all() and (live_copies[name][~mask] == 0).all()
        assert torch.equal(live_copies[name], masters[name].to(live_copies[name].dtype))
        # Gradients here do not depend on the weights and are exact in bf16, so masters agree in
        # both precisions.
        torch.testing.assert_close(masters[name], reference.w[name], rtol=1e-5, atol=1e-6)
        for key, shard in moments.items():
            want = own_part(piece, reference.optimizer.state[reference.w[name]][key])
            torch.testing.assert_close(shard[name], want, rtol=1e-5, atol=1e-7)

    total = sum(int(mask.sum()) for mask in reference.live.values())
    assert shards.num_live() == total
    assert optimizer.state_bytes() == 2 * 4 * optimizer.num_live()
    assert optimizer.num_live() == sum(int(mask.sum()) for mask in live.values())
    for index, flat in enumerate(engine.flats()):
        padding = torch.ones(flat.shape, dtype=torch.bool)
        for piece in engine.slices:
            if piece.flat == index:
                padding.narrow(0, piece.offset, piece.length).fill_(False)
        assert not optimizer.state[flat]["live"][padding].any(), "padding never lives"
        assert (flat[padding] == 0).all()
