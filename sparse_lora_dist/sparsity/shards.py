"""Keep live entries, importance statistics and moments of this rank's shards of trained tensors."""

from collections.abc import Mapping

import torch
from torch import Tensor

from sparse_lora_dist.distributed import comm
from sparse_lora_dist.distributed.device import groups_of
from sparse_lora_dist.errors import UserError
from sparse_lora_dist.methods.protocol.method import Decision, Method, Stats
from sparse_lora_dist.optim.moments import MOMENTS
from sparse_lora_dist.optim.sparse_adamw import SparseAdamW
from sparse_lora_dist.sparsity.sharded_scores import ShardScores
from sparse_lora_dist.sparsity.sites import Sites
from sparse_lora_dist.zero3.engine import Engine


class Shards:
    """Live entries, importance statistics and moments of this rank's shards of trained tensors.

    An entry is live if the optimizer steps it, and dead otherwise. The sparse method decides which
    entries of the adapters are live, from statistics that it updates with each gradient. Tensors of
    modules trained in full have no statistics, and all their entries are live.

    Tensors of adapters are named "site.tensor", where "site" is the linear's name in the base;
    other tensors have the parameter's name in the base. Where a member takes or returns "tensor
    name -> shard", a shard is 1-D, has the length of the tensor's slice in ``engine.slices``, and
    is on the device of the fp32 master shards.

    The constructor is collective: it makes the decision of step 0, if the method has one.

    Args:
        engine: engine that trains the model.
        optimizer: optimizer of ``engine``.
        method: sparse method of the run.
        sparse: names of the tensors that the method decides on.
        sites: adapters of the model.
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
        self.groups = groups_of({name: p.length for name, p in self.sparse.items()})
        """Names of the tensors that the method decides on, in groups that are read together, so
        that the number of launches does not grow with that of the tensors."""
        self.ended = False
        """True after the last decision, when the statistics have been freed."""
        self.traffic_bytes = 0
        """Bytes that this rank received for statistics and decisions since the program started."""
        self.log_values: Mapping[str, float] = {}
        """Numbers of the last decision that are logged with the metrics, by name."""
        live = {p.name: torch.ones(p.length, dtype=torch.bool) for p in engine.slices}
        if method.decides_at(0):
            first = method.decide(0, self._scores(live))
            live |= first.live
            sites.set_components(first.components)
            self.log_values = first.log_values
        self._set_live(live)

    def observe(self, step: int) -> None:
        """Update importance statistics from this step's gradients, which ZeRO-3 has reduced.

        Collective if the method has ``observe_sites``. Must be called between the step's last
        backward and the engine's step.

        Args:
            step: optimizer step, counted from 1.
        """
        if self.ended:
            return
        before = comm.traffic_bytes.total()
        self.sites.observe()
        self.traffic_bytes += comm.traffic_bytes.total() - before
        if self.method.n_stats == 0:
            return
        for names in self.groups:
            slices = [self.sparse[name] for name in names]
            stats = zip(*(self.stats[name] for name in names), strict=True)
            new = self.method.observe(
                tuple(torch.cat(parts) for parts in stats),
                torch.cat([self.engine.master(p) for p in slices]),
                torch.cat([self.engine.gradient(p) for p in slices]),
                step,
            )
            cut = (stat.split([p.length for p in slices]) for stat in new)
            self.stats |= dict(zip(names, zip(*cut, strict=True), strict=True))

    def skip_step(self) -> None:
        """Count a step that the engine did not apply, and finish its decision. Collective.

        Must be called after the engine refused a step because its loss or gradient is not finite.
        The numbers that the method probed in this step are discarded, and the entries that its
        decision zeroes become zero.
        """
        self.sites.reset_probes()
        for flat in self.engine.flats():
            self.optimizer.skip_step(flat)
        self.engine.masters_changed()

    def decides_at(self, step: int) -> bool:
        """Return True if the method has a decision to make at this step, counted from 1."""
        return not self.ended and self.method.decides_at(step)

    def decide(self, step: int) -> Decision:
        """Make the method's decision and apply it. Collective.

        Must be called before the engine's step. The live entries, and the rank-1 components that
        each adapter computes, change immediately. Entries that the decision zeroes, and those that
        stop being live, become zero at the end of the engine's step.

        Args:
            step: optimizer step, counted from 1.

        Returns:
            The decision. Its components and its numbers for the log are the same on every rank; its
            masks are those of this rank's shards.

        Raises:
            UserError: on all ranks, if a score is NaN or infinite.
        """
        before = comm.traffic_bytes.total()
        try:
            decision = self.method.decide(step, self._scores(self.live()))
        except FloatingPointError as error:
            raise UserError(
                f"At step {step}, a gradient overflowed: {error}. Lower --learning_rate, or resume "
                "from an earlier checkpoint.",
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
        """Return the sum of all adapters' ranks that a decision would give now. Collective.

        Changes nothing. An adapter's rank is its number of open components.

        Args:
            step: optimizer step, counted from 1, that the decision is made for.
        """
        decided = self.method.decide(step, self._scores(self.live())).components
        now = self.sites.ranks() | {name: components.open for name, components in decided.items()}
        return sum(now.values())

    def free_statistics(self) -> None:
        """Free the memory of the statistics and stop probing, because no more decision follows."""
        self.ended = True
        self.stats = dict.fromkeys(self.sparse, ())
        self.sites.stop_probing()

    def _change(self, decision: Decision) -> None:
        before = self.live()
        differ = [(mask != before[name]).any() for name, mask in decision.live.items()]
        flags = torch.stack(differ).tolist() if differ else []  # the host waits once
        changed = {n: m for (n, m), flag in zip(decision.live.items(), flags, strict=True) if flag}
        # Entries that stop being live are zeroed too.
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
        """Return tensor name -> mask of the live entries of this rank's shard, bool."""
        return self._cut([self.optimizer.live(flat) for flat in self.engine.flats()])

    def moments(self, key: str) -> dict[str, Tensor]:
        """Return one of Adam's moments of this rank's shards.

        Args:
            key: which moment: "exp_avg" or "exp_avg_sq".

        Returns:
            Tensor name -> shard, fp32, zero for dead entries.
        """
        return self._cut([self.optimizer.dense(flat, key) for flat in self.engine.flats()])

    def born(self) -> dict[str, Tensor]:
        """Return tensor name -> birth steps of this rank's shard, int32, zero for dead entries.

        An entry's birth step is the number of optimizer steps done when it became live.
        """
        return self._cut([self.optimizer.born(flat) for flat in self.engine.flats()])

    def restore(
        self,
        live: Mapping[str, Tensor],
        moments: Mapping[str, Mapping[str, Tensor]],
        born: Mapping[str, Tensor],
        steps: int,
    ) -> None:
        """Set live entries, moments and birth steps to those of a checkpoint. Not a collective.

        Args:
            live: tensor name -> mask of live entries of this rank's shard, bool.
            moments: "exp_avg" or "exp_avg_sq" -> (tensor name -> moment of this rank's shard,
                fp32).
            born: tensor name -> birth steps of this rank's shard, int32: number of optimizer steps
                done when an entry became live.
            steps: number of optimizer steps that were done at the checkpoint.
        """
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

    def reset_moments(self, *, adapters_only: bool = False) -> None:
        """Set Adam's moments to zero and birth steps to the number of steps done. Not a collective.

        Args:
            adapters_only: True: modules trained in full keep theirs.
        """
        names = self.sparse if adapters_only else {p.name for p in self.engine.slices}
        which = {
            p.name: torch.ones(p.length, dtype=torch.bool)
            for p in self.engine.slices
            if p.name in names
        }
        for index, flat in enumerate(self.engine.flats()):
            self.optimizer.reset_moments(flat, self._flat(index, which))

    def num_live(self) -> int:
        """Return the number of live entries on all ranks together. Collective."""
        count = torch.tensor(self.optimizer.num_live(), device=comm.device())
        return int(comm.sum_over_ranks(count))

    def statistics_bytes(self) -> int:
        """Return the size of the importance statistics on this rank, in bytes."""
        return sum(stat.nbytes for stats in self.stats.values() for stat in stats)

    def _set_live(self, live: Mapping[str, Tensor]) -> None:
        for index, flat in enumerate(self.engine.flats()):
            self.optimizer.set_live(flat, self._flat(index, live))

    def _cut(self, flats: list[Tensor]) -> dict[str, Tensor]:
        return {p.name: flats[p.flat].narrow(0, p.offset, p.length) for p in self.engine.slices}

    def _flat(
        self, index: int, values: Mapping[str, Tensor], dtype: torch.dtype = torch.bool
    ) -> Tensor:
        """Lay out values of tensors as one of the engine's flat buffers, with zero elsewhere.

        A flat buffer holds this rank's shards of many tensors one after another. Zero in a mask
        means dead, so the padding between tensors is never live.

        Args:
            index: index of the flat buffer in ``engine.flats()``.
            values: tensor name -> values of this rank's shard. Tensors of other flat buffers are
                ignored.
            dtype: dtype of the result.

        Returns:
            1-D tensor of the flat buffer's length, on its device.
        """
        flat = self.engine.flats()[index]
        out = torch.zeros(flat.shape, dtype=dtype, device=flat.device)
        for tensor_slice in self.engine.slices:
            if tensor_slice.flat == index and tensor_slice.name in values:
                out.narrow(0, tensor_slice.offset, tensor_slice.length).copy_(
                    values[tensor_slice.name]
                )
        return out
