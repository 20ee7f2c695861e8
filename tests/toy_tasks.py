"""Regressions y = (W + planted) x + noise with a known answer, learned by what a job learns with:
frozen linears and adapters under ZeRO-3, ``Shards``, ``Decisions``. What workers run for
``test_toy_tasks.py`` and ``benchmarks/toy_tasks.py``.

Linears lie side by side, each with inputs and outputs of its own. In a chain of them every
neighbour could learn the same; so a planted delta has one right place.

Shapes: S sites, N rows of a rank, I in_features, O out_features, R rank.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparse_lora_dist.adapter.dropout import RowSeeds
from sparse_lora_dist.adapter.inject import inject
from sparse_lora_dist.adapter.linear import AdapterLinear
from sparse_lora_dist.adapter.seeds import seed_of
from sparse_lora_dist.base_model.frozen_linear import FrozenLinear
from sparse_lora_dist.config.config import Config
from sparse_lora_dist.config.deepspeed_file import engine_dict
from sparse_lora_dist.config.sections import ModelConfig, TrainConfig
from sparse_lora_dist.distributed import comm
from sparse_lora_dist.export.peft_adapter import plain_pair
from sparse_lora_dist.methods import METHODS, Method, Plan
from sparse_lora_dist.methods.protocol.form import Site
from sparse_lora_dist.model.model import Model
from sparse_lora_dist.optim.learning_rate import LearningRate
from sparse_lora_dist.optim.sparse_adamw import SparseAdamW
from sparse_lora_dist.sparsity.decisions import Decisions
from sparse_lora_dist.sparsity.shards import Shards
from sparse_lora_dist.sparsity.sites import Sites
from sparse_lora_dist.tasks.class_head import Head
from sparse_lora_dist.zero3.engine import Engine
from sparse_lora_dist.zero3.parameters import ShardBuilder, gathered
from tests.toy_engine import range_of

ZERO3 = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 1000}}
"""Bases and RoseLoRA's tensors are gathered when used, the other adapters' stay whole: faster."""

NOISE = 0.05
"""Standard deviation of what no delta can explain."""

Batch = tuple[Tensor, Tensor]
"""(x_SNI, y_SNO)"""


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is planted, and how it is learned."""

    seed: int
    planted_SOI: Tensor
    rank: int
    """Capacity of every site."""
    steps: int
    rate: float

    @cached_property
    def base_SOI(self) -> Tensor:
        """W, random."""
        shape = self.planted_SOI.shape
        return torch.randn(shape, generator=self._generator("base")) / math.sqrt(shape[2])

    def batch(self, *place: int | str, rows: int = 32) -> Batch:
        """Rows of its own for every place."""
        generator, (sites, num_out, num_in) = self._generator(*place), self.planted_SOI.shape
        x_SNI = torch.randn(sites, rows, num_in, generator=generator)
        noise_SNO = NOISE * torch.randn(sites, rows, num_out, generator=generator)
        return x_SNI, x_SNI @ (self.base_SOI + self.planted_SOI).mT + noise_SNO

    @property
    def noise_loss(self) -> float:
        """The loss that is left when all is learned."""
        return 0.5 * NOISE**2 * self.planted_SOI.shape[:2].numel()

    @property
    def plan(self) -> Plan:
        """For the method's factory."""
        sites, num_out, num_in = self.planted_SOI.shape
        shape = {"in_features": num_in, "out_features": num_out, "rank": self.rank}
        return Plan(
            total_steps=self.steps,
            warmup_steps=0,
            learning_rate=self.rate,
            sites=tuple(Site(name=f"linears.{s}", **shape) for s in range(sites)),
        )

    def _generator(self, *place: int | str) -> torch.Generator:
        return torch.Generator().manual_seed(seed_of(self.seed, *place))


def sparse_task(seed: int) -> Task:
    """200 nonzeros in 256 x 256: two outer products of 10 rows and 10 columns each."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = (torch.randperm(256, generator=generator)[:20].view(2, 10) for _ in range(2))
    planted_OI = torch.zeros(256, 256)
    for row, column in zip(rows, columns, strict=True):
        u, v = (torch.randn(10, generator=generator).sign() for _ in range(2))
        u, v = (t * (0.5 + torch.rand(10, generator=generator)) for t in (u, v))
        planted_OI[row[:, None], column] = 0.3 * torch.outer(u, v)
    return Task(seed=seed, planted_SOI=planted_OI[None], rank=8, steps=120, rate=2e-2)


def rank_two_task(seed: int) -> Task:
    """Two equal singular values in 64 x 64, capacity 8."""
    planted_SOI = 2.0 * low_rank(64, 2, seed)[None]
    return Task(seed=seed, planted_SOI=planted_SOI, rank=8, steps=150, rate=2e-2)


def one_of_four_task(seed: int) -> Task:
    """Rank 8 in the third of four linears of 64 x 64, nothing in the others."""
    planted_SOI = torch.zeros(4, 64, 64)
    planted_SOI[2] = low_rank(64, 8, seed)
    return Task(seed=seed, planted_SOI=planted_SOI, rank=12, steps=150, rate=1e-2)


def low_rank(side: int, rank: int, seed: int) -> Tensor:
    """U V^T with orthonormal columns."""
    generator = torch.Generator().manual_seed(seed)
    u_OR, v_IR = (torch.linalg.qr(torch.randn(side, rank, generator=generator)).Q for _ in "uv")
    product_OI: Tensor = u_OR @ v_IR.T
    return product_OI


@dataclass(frozen=True, kw_only=True)
class Learned:
    """What came of a task, the same on every rank."""

    left: float
    """Share of the held-out loss above noise that is still there."""
    ranks: list[int]
    """Open pieces of every site."""
    zeros: float
    """Share of the products' entries that are exactly zero."""
    covered: float
    """Share of the planted entries that are not."""


class SideBySide(nn.Module):
    """y_s = W_s x_s"""

    def __init__(self, base_SOI: Tensor, builder: ShardBuilder) -> None:
        super().__init__()
        _, num_out, num_in = base_SOI.shape
        weights = (builder.parameter((num_out, num_in), range_of(w)) for w in base_SOI)
        self.linears = nn.ModuleList(FrozenLinear(num_in, num_out, w, None) for w in weights)

    def forward(self, x_SNI: Tensor) -> Tensor:
        return torch.stack([f(x) for f, x in zip(self.linears, x_SNI, strict=True)])


def learn(
    task: Task,
    name: str,
    options: Mapping[str, Any] | None = None,
    watched: Callable[[Method], Method] = lambda method: method,
) -> Learned:
    """Train ``task`` with a method, as ``train.run`` puts it together. Collective."""
    factory = METHODS[name]
    method = watched(factory.build(factory.options(**options or {}), task.plan))
    engine, shards = _set_up(task, method)
    rate = LearningRate(
        name="linear",
        peak=task.rate,
        warmup_steps=0,
        stages=method.stages or (task.steps,),
        newborn_warmup=method.newborn_warmup or 0,
        newborn_restarts=method.newborn_restarts,
    )
    decisions, before = Decisions(shards), _held_out_loss(engine, task)
    for step in range(1, task.steps + 1):
        engine.set_learning_rate(lambda born, step=step: rate.at(step, born))  # type: ignore[misc]
        engine.backward(_loss(engine, task.batch(step, comm.rank())))
        shards.observe(step)
        decisions.make(step)
        engine.step()
        decisions.confirm(step)
    after, noise = _held_out_loss(engine, task), task.noise_loss
    learned_SOI = torch.stack([_product(a) for a in shards.sites.adapters.values()])
    return Learned(
        left=(after - noise) / (before - noise),
        ranks=list(shards.sites.ranks().values()),
        zeros=float((learned_SOI == 0).float().mean()),
        covered=float((learned_SOI[task.planted_SOI != 0] != 0).float().mean()),
    )


def _set_up(task: Task, method: Method) -> tuple[Engine, Shards]:
    train = TrainConfig(micro_batch_size=1, gradient_accumulation_steps=1, max_grad_norm=0.0)
    config = Config(model=ModelConfig(precision="fp32"), train=train)
    engine_config = engine_dict(ZERO3, config, comm.world_size())
    builder = ShardBuilder(engine_config, torch.float32)
    module: Any = SideBySide(task.base_SOI, builder)
    adapters = inject(
        module,
        task.plan.sites,
        method,
        builder,
        RowSeeds(seed=task.seed, sequence_length=1),
        alpha=float(task.rank),
        dropout=0.0,
        micro_batches=1,
        initial={},
    )
    nothing: Any = None
    model = Model(
        module=module,
        folder=Path(),
        files=nothing,
        sources={},
        name="",
        sites=list(task.plan.sites),
        head=Head(),
        full={},
        adapters=adapters,
    )
    optimizer = SparseAdamW(model.param_groups(0.0), lr=task.rate, weight_decay=0.0)
    engine, sites = Engine(module, optimizer, engine_config), Sites(adapters, method)
    return engine, Shards(engine, optimizer, method, sparse=sites.tensors(), sites=sites)


def _loss(engine: Engine, batch: Batch) -> Tensor:
    x_SNI, y_SNO = batch
    squares_SNO: Tensor = (engine(x_SNI=x_SNI) - y_SNO).square()
    return 0.5 * squares_SNO.sum(dim=(0, 2)).mean()


def _held_out_loss(engine: Engine, task: Task) -> float:
    with engine.evaluating():
        own = _loss(engine, task.batch("held out", comm.rank(), rows=256))
    return float(comm.sum_over_ranks(own)) / comm.world_size()


def _product(adapter: AdapterLinear) -> Tensor:
    """The learned delta_OI; alpha is the rank, so its scale is 1."""
    parameters = [getattr(adapter, name) for name in adapter.specs]
    with gathered(parameters):
        a_RI, b_OR = plain_pair(adapter, [p.data for p in parameters])
        return b_OR @ a_RI


def learned_sparse(seed: int) -> Learned:
    """RoseLoRA, a decision every 4 steps, else its defaults."""
    return learn(sparse_task(seed), "roselora", {"roselora_every": 4})


def learned_rank_two(seed: int) -> Learned:
    """SoRA's defaults."""
    return learn(rank_two_task(seed), "sora")


def learned_rank_two_with_two(seed: int) -> Learned:
    """Plain LoRA that knows the rank."""
    return learn(replace(rank_two_task(seed), rank=2), "lora")


GROWN = {"increlora_target_rank": 3.0}


def grown_in_one_of_four(seed: int, score: str) -> Learned:
    """IncreLoRA: 4 pieces at first, 12 in the end."""
    return learn(one_of_four_task(seed), "increlora", GROWN | {"increlora_score": score})


def kept_in_one_of_four(seed: int) -> Learned:
    """AdaLoRA: 48 pieces at first, 8 in the end."""
    options = {"adalora_target_rank": 2.0, "adalora_every": 3}
    return learn(one_of_four_task(seed), "adalora", options)
