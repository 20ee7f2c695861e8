"""Make a method's decisions, and check that all ranks still train the same adapter.

A decision changes, at one optimizer step, which entries of the trained tensors are live (stepped by
the optimizer; all others are dead) and which rank each adapter has. Three faults would go unnoticed
without the check:

- Two ranks make different decisions.
- A dead entry changes.
- The low-precision copy of a tensor, which forward uses, has other zeros than the fp32 master.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict

import torch
from torch import Tensor

from sparse_lora_dist.distributed import comm
from sparse_lora_dist.errors import UserError
from sparse_lora_dist.methods.protocol.method import Decision
from sparse_lora_dist.sparsity.shards import Shards
from sparse_lora_dist.zero3.parameters import gathered

Digests = Mapping[str, str]
"""Tensor name -> hash of the mask of its zeros, and "the decision" -> hash of the decision; both
hashes in hexadecimal."""

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
        now = self._digests_of_dead_entries()
        moved = [name for name in now if now[name] != self._dead_digests[name]]
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
        patterns, stale = {"the decision": _record(self._made)}, []
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
                for name, parameter in parameters.items():
                    zero = parameter.data.flatten() == 0
                    patterns[name] = digest(zero)
                    if not self._has_zeros_of_master(name, zero, parameter.dtype):
                        stale.append(name)
        _compare(step, patterns, stale)
        self._dead_digests, self._made = self._digests_of_dead_entries(), None

    def _has_zeros_of_master(self, name: str, zero: Tensor, dtype: torch.dtype) -> bool:
        tensor_slice = self.shards.sparse[name]
        master = self.shards.engine.master(tensor_slice)
        own = zero[tensor_slice.start : tensor_slice.start + tensor_slice.length]
        return torch.equal((master.to(dtype) == 0).to(own.device), own)

    def _digests_of_dead_entries(self) -> dict[str, str]:
        live = self.shards.live()
        masters = {n: self.shards.engine.master(p) for n, p in self.shards.sparse.items()}
        return {name: digest(w[~live[name].to(w.device)]) for name, w in masters.items()}


def _record(decision: Decision) -> str:
    components = {name: asdict(p) for name, p in decision.components.items()}
    said = json.dumps([components, dict(decision.log_values)], sort_keys=True)
    return hashlib.sha256(said.encode()).hexdigest()


def digest(t: Tensor) -> str:
    """Return the BLAKE2b hash of a tensor's bytes, in hexadecimal."""
    return hashlib.blake2b(t.cpu().numpy().tobytes(), digest_size=16).hexdigest()


def _compare(step: int, patterns: Digests, stale: list[str]) -> None:
    everyone = comm.gather_objects((patterns, stale))
    for rank, (theirs, their_stale) in enumerate(everyone):
        differ = [name for name in patterns if theirs[name] != everyone[0][0][name]]
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
