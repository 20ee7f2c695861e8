"""This rank's shards of what trains, as the step and the checkpoint need them: statistics, masks,
moments."""

import torch
from torch import Tensor

from sparse_lora_dist import comm
from sparse_lora_dist.errors import UserError
from sparse_lora_dist.methods.base import Method, Stats
from sparse_lora_dist.optim import SparseAdamW
from sparse_lora_dist.scores import ShardScore
from sparse_lora_dist.zero3 import Engine


class Shards:
    """Importance statistics and live entries of every adapter tensor, each where its gradient shard
    lies.

    Modules trained in full have no statistics and live whole.
    """

    def __init__(
        self, engine: Engine, optimizer: SparseAdamW, method: Method, adapters: set[str]
    ) -> None:
        self.engine, self.optimizer, self.method = engine, optimizer, method
        self.sparse = [piece for piece in engine.slices if piece.name in adapters]
        self.stats: dict[str, Stats] = {
            piece.name: tuple(torch.zeros_like(engine.master(piece)) for _ in range(method.n_stats))
            for piece in self.sparse
        }
        self._set_live({p.name: torch.ones(p.length, dtype=torch.bool) for p in engine.slices})

    def observe(self) -> None:
        """Update the statistics from this step's gradients. Local: those are global already."""
        if self.method.n_stats == 0:
            return
        for piece in self.sparse:
            w, grad = self.engine.master(piece), self.engine.gradient(piece)
            self.stats[piece.name] = self.method.observe(self.stats[piece.name], w, grad)

    def decide(self, step: int) -> None:
        """Let the method choose what lives, from scores the same on every rank. Collective."""
        if not self.method.decides_at(step):
            return
        scores = {
            piece.name: ShardScore(
                shard=self.method.score(self.stats[piece.name]),
                start=piece.start,
                shape=piece.shape,
            )
            for piece in self.sparse
        }
        try:
            masks = self.method.decide(step, scores)
        except FloatingPointError as error:
            problem = UserError(
                f"step {step}: {error}, since a gradient overflowed. Lower --learning_rate, or go "
                "on from an earlier checkpoint."
            )
            problem.shared = True
            raise problem from error
        live = self.live()
        if any(not torch.equal(live[name], mask) for name, mask in masks.items()):
            self._set_live(live | masks)

    def live(self) -> dict[str, Tensor]:
        """Tensor -> bool shard of its live entries."""
        flats = self.engine.flats()
        masks = [self.optimizer.state[flat]["live"] for flat in flats]
        return {p.name: masks[p.flat].narrow(0, p.offset, p.length) for p in self.engine.slices}

    def moments(self, key: str) -> dict[str, Tensor]:
        """Tensor -> its shard of a moment, spread out: zero where nothing lives."""
        dense = [self.optimizer.dense(flat, key) for flat in self.engine.flats()]
        return {p.name: dense[p.flat].narrow(0, p.offset, p.length) for p in self.engine.slices}

    def restore(
        self, live: dict[str, Tensor], moments: dict[str, dict[str, Tensor]], steps: int
    ) -> None:
        """Put back what ``live`` and ``moments`` gave, after ``steps`` optimizer steps."""
        self._set_live(live)
        for index, flat in enumerate(self.engine.flats()):
            state = self.optimizer.state[flat]
            state["step"] = steps
            for key, values in moments.items():
                state[key] = self._flat(index, values, torch.zeros_like(flat.data))[state["live"]]

    def num_live(self) -> int:
        """Live entries of all ranks together. Collective."""
        count = torch.tensor(self.optimizer.num_live(), device=comm.device())
        return int(comm.sum_over_ranks(count))

    def _set_live(self, live: dict[str, Tensor]) -> None:
        for index, flat in enumerate(self.engine.flats()):
            # Starts all dead, so that the padding between tensors never lives.
            whole = torch.zeros(flat.shape, dtype=torch.bool, device=flat.device)
            self.optimizer.set_live(flat, self._flat(index, live, whole))

    def _flat(self, index: int, values: dict[str, Tensor], out: Tensor) -> Tensor:
        """Shards of tensors put where they lie in flat shard ``index``."""
        for piece in self.engine.slices:
            if piece.flat == index:
                out.narrow(0, piece.offset, piece.length).copy_(values[piece.name])
        return out
