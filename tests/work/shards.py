"""What workers run for ``test_zero3_contract.py``: masks and moments over the flat shards."""

from math import prod

import torch
from torch import Tensor

from sparse_lora_dist.distributed import comm
from sparse_lora_dist.methods.protocol.method import By, Decision, Method, Scores, Stats
from sparse_lora_dist.optim.moments import MOMENTS
from sparse_lora_dist.optim.sparse_adamw import SparseAdamW
from sparse_lora_dist.sparsity.shards import Shards
from sparse_lora_dist.sparsity.sites import Sites
from sparse_lora_dist.zero3.engine import Engine
from tests.fixtures.toy_engine import (
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
from tests.fixtures.whole_scores import WholeScores


def sparse_training() -> list[int]:
    """Masks from a method's decision, against AdamW on whole tensors in one process; entries that
    live on this rank after the decision, in each case."""
    counts = []
    method = Method(
        name="halves",
        n_stats=1,
        observe=lambda stats, w, grad, step: (stats[0] * 0.5 + (w * grad).abs(),),
        decides_at=lambda step: step in (2, 4),
        decide=_halve_then_revive,
    )
    for engine, optimizer, _ in toys():
        sparse = {p.name for p in engine.slices if "wide" not in p.name}
        shards = Shards(engine, optimizer, method, sparse=sparse, sites=Sites([], method))
        reference = Reference(method, sparse)
        for step in range(1, 6):
            x_R1 = inputs(1) + step
            engine.backward(engine(x=x_R1[comm.rank(), 0]))
            shards.observe(step)
            if shards.decides_at(step):
                shards.decide(step)
            engine.step()
            reference.step(step, x_R1.mean())
            _compare_shards(engine, optimizer, shards, reference)
            if step == 3:
                counts.append(optimizer.num_live())
    return counts


def _halve_then_revive(step: int, scores: Scores) -> Decision:
    by: dict[str, By] = dict.fromkeys(scores.shapes, "tensor")
    if step == 4:
        everything = torch.ones(1, dtype=torch.bool)
        return Decision(live={name: scores.spread(name, everything, "tensor") for name in by})
    halves = {name: max(1, prod(shape) // 2) for name, shape in scores.shapes.items()}
    return Decision(live=scores.top_k(halves, by))


class Reference:
    """The same training on whole tensors: AdamW written out, every entry with its own age."""

    def __init__(self, method: Method, sparse: set[str]) -> None:
        self.method = method
        self.w = {f"parts.{n}.weight": initial(s).clone() for n, s in SHAPES.items()}
        self.stats: dict[str, Stats] = {n: (torch.zeros_like(self.w[n]),) for n in sparse}
        self.live = {n: torch.ones_like(w, dtype=torch.bool) for n, w in self.w.items()}
        self.born = {n: torch.zeros_like(w) for n, w in self.w.items()}
        self.moments = {key: {n: torch.zeros_like(w) for n, w in self.w.items()} for key in MOMENTS}

    def step(self, step: int, x: Tensor) -> None:
        grads = {n: coefficients(tuple(w.shape)) * x for n, w in self.w.items()}
        for n in self.stats:
            self.stats[n] = self.method.observe(self.stats[n], self.w[n], grads[n], step)
        if self.method.decides_at(step):
            scores = WholeScores({name: stats[0] for name, stats in self.stats.items()})
            self._mask(step, self.method.decide(step, scores))
        for n, w in self.w.items():
            m, v = (self.moments[key][n] for key in MOMENTS)
            age = step - self.born[n]
            m.lerp_(grads[n], 0.1).mul_(self.live[n])
            v.mul_(0.999).addcmul_(grads[n], grads[n], value=1 - 0.999).mul_(self.live[n])
            denominator = (v / (1 - 0.999**age)).sqrt() + 1e-8
            w.mul_(1 - LR * DECAY).sub_(LR * m / (1 - 0.9**age) / denominator).mul_(self.live[n])

    def _mask(self, step: int, decision: Decision) -> None:
        for name, mask in decision.live.items():
            live = mask.view(self.w[name].shape)
            self.born[name][live & ~self.live[name]] = step - 1
            self.live[name] = live


def _compare_shards(
    engine: Engine, optimizer: SparseAdamW, shards: Shards, reference: Reference
) -> None:
    masters, live_copies = whole_masters(engine), live_copy(engine)
    moments = {key: shards.moments(key) for key in MOMENTS}
    live = shards.live()
    for component in engine.slices:
        name, mask = component.name, reference.live[component.name]
        assert torch.equal(live[name], own_part(component, mask)), name
        assert (masters[name][~mask] == 0).all() and (live_copies[name][~mask] == 0).all()
        assert torch.equal(live_copies[name], masters[name].to(live_copies[name].dtype))
        # Gradients here do not depend on the weights and are exact in bf16, so masters agree in
        # both precisions.
        torch.testing.assert_close(masters[name], reference.w[name], rtol=1e-5, atol=1e-6)
        for key, shard in moments.items():
            want = own_part(component, reference.moments[key][name])
            torch.testing.assert_close(shard[name], want, rtol=1e-5, atol=1e-7)

    total = sum(int(mask.sum()) for mask in reference.live.values())
    assert shards.num_live() == total
    assert optimizer.num_live() == sum(int(mask.sum()) for mask in live.values())
    for index, flat in enumerate(engine.flats()):
        padding = torch.ones(flat.shape, dtype=torch.bool)
        for component in engine.slices:
            if component.flat == index:
                padding.narrow(0, component.offset, component.length).fill_(False)
        assert not optimizer.live(flat)[padding].any(), "padding never lives"
        assert (flat[padding] == 0).all()
