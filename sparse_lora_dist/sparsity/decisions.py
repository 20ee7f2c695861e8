"""Make a method's decisions, and check that all ranks still train the same adapter.

A decision changes, at one optimizer step, which entries of the trained tensors are live (stepped by
the optimizer; all others are dead) and which rank each adapter has. Three faults would go unnoticed
without the check:

- Two ranks make different decisions.
- A dead entry changes.
- The low-precision copy of a tensor, which forward uses, has other zeros than the fp32 master.

Tensors are compared by digests that are made where they lie, so that the host waits once for all of
them. Shapes: N entries of several tensors one after another, T tensors.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict

import torch
from torch import Tensor

from sparse_lora_dist.distributed import comm
from sparse_lora_dist.distributed.device import moved
from sparse_lora_dist.errors import UserError
from sparse_lora_dist.methods.protocol.method import Decision
from sparse_lora_dist.methods.shared.hashed_random import hashes
from sparse_lora_dist.sparsity.shards import Shards
from sparse_lora_dist.zero3.parameters import gathered

MODULES = 16
"""Number of adapters that ``confirm`` gathers at a time. 16 take 19 MB in bf16 for the widest
linears of a 70B model at rank 16."""


class Decisions:
    """Makes the method's decisions, and checks that they have the same outcome on all ranks.

    Each optimizer step calls ``make`` before the engine's step, and ``confirm`` after it.

    Args:
        shards: this rank's shards of the trained tensors, with their live entries.
    """

    def __init__(self, shards: Shards) -> None:
        self.shards = shards
        self._made: Decision | None = None
        self._dead_digests = self._digests_of_dead_entries()

    def make(self, step: int) -> Decision | None:
        """Make and apply the method's decision, if one is due at this step. Collective.

        Must be called between a step's last backward and the engine's step.

        Args:
            step: optimizer step, counted from 1.

        Returns:
            The decision; None if none is due.

        Raises:
            UserError: on all ranks, if dead entries, which the optimizer does not step, have
                changed since the last decision, or if scores are not finite.
        """
        if not self.shards.decides_at(step):
            return None
        changed_T = self._digests_of_dead_entries() != self._dead_digests
        moved = [name for name, c in zip(self._names(), changed_T.tolist(), strict=True) if c]
        for rank, names in enumerate(comm.gather_objects(moved)):
            if names:
                raise _divergence(
                    f"At step {step}, entries of {names[0]} that are not trained have changed on "
                    f"rank {rank} since the last decision"
                )
        self._made = self.shards.decide(step)
        return self._made

    def confirm(self, step: int) -> None:
        """Raise ``UserError`` if ranks differ in this step's decision or its outcome. Collective.

        Must be called after the engine's step, on all ranks. To bound memory, it gathers
        ``MODULES`` adapters at a time. Does nothing if ``make`` had no decision to make at this
        step.

        Args:
            step: optimizer step, counted from 1, that ``make`` was called with.

        Raises:
            UserError: on all ranks, if two ranks have made different decisions or see different
                zeros in a gathered tensor, or if its zeros differ from those of its fp32 master.
        """
        if self._made is None:
            return
        names, patterns, stale = [], [], []
        adapters = list(self.shards.sites.adapters.values())
        for first in range(0, len(adapters), MODULES):
            parameters = {
                name: getattr(adapter, key)
                for adapter in adapters[first : first + MODULES]
                for key in adapter.specs
                # A tensor that all sites share is listed at the first site only.
                if (name := f"{adapter.site.name}.{key}") in self.shards.sparse
            }
            with gathered(parameters.values()):
                zeros = {name: p.data.flatten() == 0 for name, p in parameters.items()}
                if zeros:
                    names += list(zeros)
                    lengths = [len(zero_N) for zero_N in zeros.values()]
                    patterns.append(digests(torch.cat([*zeros.values()]).long(), lengths))
                    stale.append(self._other_zeros(zeros, next(iter(parameters.values())).dtype))
        _compare(step, _record(self._made), names, torch.cat(patterns), torch.cat(stale))
        self._dead_digests, self._made = self._digests_of_dead_entries(), None

    def _other_zeros(self, zeros: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
        """Count the entries of this rank that are zero in the master or in the copy, but not both.

        Args:
            zeros: tensor name -> mask of the zeros of the gathered copy.
            dtype: dtype of the copy.

        Returns:
            int64 [T], one count for each tensor.
        """
        slices = [self.shards.sparse[name] for name in zeros]
        own = [zeros[p.name].narrow(0, p.start, p.length) for p in slices]
        master_N = torch.cat([self.shards.engine.master(p) for p in slices])
        differ_N = (master_N.to(dtype) == 0).to(own[0].device) != torch.cat(own)
        return sums(differ_N.long(), [p.length for p in slices])

    def _names(self) -> list[str]:
        return [name for names in self.shards.groups for name in names]

    def _digests_of_dead_entries(self) -> Tensor:
        """Return the digest of each tensor's dead entries on this rank, int64 [T] as ``_names``."""
        live, parts = self.shards.live(), []
        for names in self.shards.groups:
            slices = [self.shards.sparse[name] for name in names]
            w_N = torch.cat([self.shards.engine.master(p) for p in slices])
            live_N = torch.cat([live[name] for name in names]).to(w_N.device)
            dead_N = w_N.view(torch.int32).long().masked_fill(live_N, 0)
            parts.append(digests(dead_N, [p.length for p in slices]))
        return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64)


def _record(decision: Decision) -> str:
    components = {name: asdict(p) for name, p in decision.components.items()}
    said = json.dumps([components, dict(decision.log_values)], sort_keys=True)
    return hashlib.sha256(said.encode()).hexdigest()


def digests(values_N: Tensor, lengths: Sequence[int]) -> Tensor:
    """Return a digest of each of several tensors: sum_i v_i h_i modulo 2^64, with odd hashes h_i.

    A tensor of which one entry changes by less than 2^32 always gets another digest, as h_i has an
    inverse modulo 2^64. Where more entries change, it stays the same by chance only.

    Args:
        values_N: entries of the tensors one after another, int64.
        lengths: number of entries of each of the T tensors.

    Returns:
        int64 [T] on the device of ``values_N``.
    """
    return sums(values_N * (hashes(len(values_N), 0, values_N.device) | 1), lengths)


def sums(values_N: Tensor, lengths: Sequence[int]) -> Tensor:
    """Return the sum of each of several tensors that lie one after another, modulo 2^64.

    Args:
        values_N: entries of the tensors, int64.
        lengths: number of entries of each of the T tensors.

    Returns:
        int64 [T] on the device of ``values_N``.
    """
    (ends_T,) = moved(values_N.device, torch.tensor(lengths).cumsum(0))
    up_to_N = torch.nn.functional.pad(values_N.cumsum(0), (1, 0))
    return up_to_N[ends_T].diff(prepend=up_to_N[:1])


def _compare(
    step: int, record: str, names: Sequence[str], patterns_T: Tensor, stale_T: Tensor
) -> None:
    stale = [name for name, count in zip(names, stale_T.tolist(), strict=True) if count]
    own = dict(zip(["the decision", *names], [record, *patterns_T.tolist()], strict=True))
    everyone = comm.gather_objects((own, stale))
    for rank, (theirs, their_stale) in enumerate(everyone):
        differ = [name for name in own if theirs[name] != everyone[0][0][name]]
        if differ:
            raise _divergence(f"At step {step}, {differ[0]} differs between rank 0 and rank {rank}")
        if their_stale:
            raise _divergence(
                f"At step {step}, the gathered copy of {their_stale[0]} that forward uses has "
                f"other zeros than the fp32 master on rank {rank}"
            )


def _divergence(what: str) -> UserError:
    return UserError(
        f"{what}. The ranks no longer train the same model, so the run stops without saving. "
        "Resume from the last checkpoint with --resume auto. If it happens again, check the memory "
        "and the network of that rank's machine.",
        shared=True,
    )
