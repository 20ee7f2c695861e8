"""This rank's shards of what trains, as the step and the checkpoint need them: statistics, masks,
moments."""

from collections.abc import Mapping

import torch
from torch import Tensor

from sparse_lora_dist.distributed import comm
from sparse_lora_dist.errors import UserError
from sparse_lora_dist.methods.protocol.method import Decision, Method, Stats
from sparse_lora_dist.optim.moments import MOMENTS
from sparse_lora_dist.optim.sparse_adamw import SparseAdamW
from sparse_lora_dist.sparsity.sharded_scores import ShardScores
from sparse_lora_dist.sparsity.sites import Sites
from sparse_lora_dist.zero3.engine import Engine


class Shards:
    """Importance statistics and live entries of every adapter tensor, each where its gradient shard
    lies.

    Modules trained in full have no statistics and live whole.
    """

    def __init__(
        self,
        engine: Engine,
        optimizer: SparseAdamW,
        method: Method,
        *,
        sparse: set[str],
        sites: Sites,
    ) -> None:
        """Collective. ``sparse`` names the tensors that the method decides on."""
        self.engine, self.optimizer, self.method, self.sites = engine, optimizer, method, sites
        self.sparse = {
            tensor_slice.name: tensor_slice
            for tensor_slice in engine.slices
            if tensor_slice.name in sparse
        }
        self.stats: dict[str, Stats] = {
            name: tuple(torch.zeros_like(engine.master(p)) for _ in range(method.n_stats))
            for name, p in self.sparse.items()
        }
        self.ended = False
        self.traffic_bytes = 0  # received for statistics and decisions since the program started
        self.log_values: Mapping[str, float] = {}
        """What the last decision said of itself."""
        live = {p.name: torch.ones(p.length, dtype=torch.bool) for p in engine.slices}
        if method.decides_at(0):
            first = method.decide(0, self._scores(live))
            live |= first.live
            sites.set_components(first.components)
            self.log_values = first.log_values
        self._set_live(live)

    def observe(self, step: int) -> None:
        """Update the statistics from this step's gradients. Collective only where sites are
        probed: the gradients are global already."""
        if self.ended:
            return
        before = comm.traffic_bytes.total()
        self.sites.observe()
        self.traffic_bytes += comm.traffic_bytes.total() - before
        if self.method.n_stats == 0:
            return
        for name, tensor_slice in self.sparse.items():
            w, grad = self.engine.master(tensor_slice), self.engine.gradient(tensor_slice)
            self.stats[name] = self.method.observe(self.stats[name], w, grad, step)

    def skip_step(self) -> None:
        """The engine refused the step: bring about what a decision left for its end. Collective."""
        self.sites.reset_probes()
        for flat in self.engine.flats():
            self.optimizer.skip_step(flat)
        self.engine.masters_changed()

    def decides_at(self, step: int) -> bool:
        """Is a decision due?"""
        return not self.ended and self.method.decides_at(step)

    def decide(self, step: int) -> Decision:
        """Let the method choose what lives, from scores the same on every rank. What it zeroes is
        zero after the engine's step. Collective."""
        before = comm.traffic_bytes.total()
        try:
            decision = self.method.decide(step, self._scores(self.live()))
        except FloatingPointError as error:
            raise UserError(
                f"step {step}: {error}, since a gradient overflowed. Lower --learning_rate, or go "
                "on from an earlier checkpoint.",
                shared=True,
            ) from error
        self.traffic_bytes += comm.traffic_bytes.total() - before
        self.sites.set_components(decision.components)
        self._change(decision)
        self.log_values = decision.log_values
        if self.method.observes_until is not None and step >= self.method.observes_until:
            self.free_statistics()
        return decision

    def ranks_now(self, step: int) -> int:
        """Open components of all sites, as a decision would find them now. Collective."""
        decided = self.method.decide(step, self._scores(self.live())).components
        now = self.sites.ranks() | {name: components.open for name, components in decided.items()}
        return sum(now.values())

    def free_statistics(self) -> None:
        """The last decision is made: give the statistics' memory back."""
        self.ended = True
        self.stats = dict.fromkeys(self.sparse, ())
        self.sites.stop_probing()

    def _change(self, decision: Decision) -> None:
        before = self.live()
        changed = {n: m for n, m in decision.live.items() if not torch.equal(m, before[n])}
        # What leaves the living is zeroed too.
        zero = dict(decision.zero)
        for name, mask in changed.items():
            left = before[name] & ~mask
            zero[name] = zero[name] | left if name in zero else left
        for index, flat in enumerate(self.engine.flats()):
            names = {p.name for p in self.engine.slices if p.flat == index}
            if names & changed.keys():
                self.optimizer.set_live(flat, self._flat(index, before | changed))
            if names & zero.keys():
                self.optimizer.zero_after_step(flat, self._flat(index, zero))

    def _scores(self, live: Mapping[str, Tensor]) -> ShardScores:
        return ShardScores(
            slices=self.sparse,
            score=lambda name: self.method.score(
                self.stats[name], self.engine.master(self.sparse[name])
            ),
            live_mask=lambda name: live[name],
            site_stats=self.sites.stats,
        )

    def live(self) -> dict[str, Tensor]:
        """Tensor -> bool shard of its live entries."""
        return self._cut([self.optimizer.live(flat) for flat in self.engine.flats()])

    def moments(self, key: str) -> dict[str, Tensor]:
        """Tensor -> its shard of a moment, spread out: zero where nothing lives."""
        return self._cut([self.optimizer.dense(flat, key) for flat in self.engine.flats()])

    def born(self) -> dict[str, Tensor]:
        """Tensor -> its shard of the steps after which each entry came to life, spread out."""
        return self._cut([self.optimizer.born(flat) for flat in self.engine.flats()])

    def restore(
        self,
        live: Mapping[str, Tensor],
        moments: Mapping[str, Mapping[str, Tensor]],
        born: Mapping[str, Tensor],
        steps: int,
    ) -> None:
        """Put back what ``live``, ``moments`` and ``born`` gave, after ``steps`` optimizer
        steps."""
        for index, flat in enumerate(self.engine.flats()):
            exp_avg, exp_avg_sq = (
                self._flat(index, moments[key], torch.float32) for key in MOMENTS
            )
            self.optimizer.restore(
                flat,
                live=self._flat(index, live),
                exp_avg=exp_avg,
                exp_avg_sq=exp_avg_sq,
                born=self._flat(index, born, torch.int32),
                steps=steps,
            )

    def num_live(self) -> int:
        """Live entries of all ranks together. Collective."""
        count = torch.tensor(self.optimizer.num_live(), device=comm.device())
        return int(comm.sum_over_ranks(count))

    def statistics_bytes(self) -> int:
        """Bytes of statistics on this rank."""
        return sum(stat.nbytes for stats in self.stats.values() for stat in stats)

    def _set_live(self, live: Mapping[str, Tensor]) -> None:
        for index, flat in enumerate(self.engine.flats()):
            self.optimizer.set_live(flat, self._flat(index, live))

    def _cut(self, flats: list[Tensor]) -> dict[str, Tensor]:
        return {p.name: flats[p.flat].narrow(0, p.offset, p.length) for p in self.engine.slices}

    def _flat(
        self, index: int, values: Mapping[str, Tensor], dtype: torch.dtype = torch.bool
    ) -> Tensor:
        """Shards of tensors put where they lie in flat shard ``index``; zero elsewhere, so that the
        padding between tensors never lives."""
        flat = self.engine.flats()[index]
        out = torch.zeros(flat.shape, dtype=dtype, device=flat.device)
        for tensor_slice in self.engine.slices:
            if tensor_slice.flat == index and tensor_slice.name in values:
                out.narrow(0, tensor_slice.offset, tensor_slice.length).copy_(
                    values[tensor_slice.name]
                )
        return out
