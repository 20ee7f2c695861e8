"""Do all ranks still compute with the same adapter? Asked after every decision.

Three things can part them without a word: a decision that came out differently, an entry that moved
though nobody steps it, and a low-precision copy in forward that is not the master's.
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

MODULES = 16
"""Adapters gathered at a time to be compared: 19 MB of bf16 at rank 16 in a 70B model's widest."""


class Decisions:
    """Has the method decide when it is due, and makes sure of what came of it."""

    def __init__(self, shards: Shards) -> None:
        self.shards = shards
        self._made: Decision | None = None
        self._resting = self._digests_at_rest()

    def make(self, step: int) -> Decision | None:
        """Between the last backward and the engine's step; None where nothing is due. Collective.

        Raises:
            UserError: entries that are not live have moved since the last decision.
        """
        if not self.shards.decides_at(step):
            return None
        now = self._digests_at_rest()
        moved = [name for name in now if now[name] != self._resting[name]]
        for rank, names in enumerate(comm.gather_objects(moved)):
            if names:
                raise _apart(
                    f"step {step}: entries of {names[0]} that do not train have changed on rank "
                    f"{rank} since the last decision"
                )
        self._made = self.shards.decide(step)
        return self._made

    def confirm(self, step: int) -> None:
        """After the engine's step: one decision, one zero pattern on every rank. Collective;
        gathers ``MODULES`` modules at a time.

        Raises:
            UserError: ranks differ.
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
                # What all sites share stands at the first alone.
                if (name := f"{adapter.site.name}.{key}") in self.shards.sparse
            }
            with gathered(parameters.values()):
                for name, parameter in parameters.items():
                    zero = parameter.data.flatten() == 0
                    patterns[name] = digest(zero)
                    if not self._is_the_masters(name, zero, parameter.dtype):
                        stale.append(name)
        _compare(step, patterns, stale)
        self._resting, self._made = self._digests_at_rest(), None

    def _is_the_masters(self, name: str, zero: Tensor, dtype: torch.dtype) -> bool:
        tensor_slice = self.shards.sparse[name]
        master = self.shards.engine.master(tensor_slice)
        own = zero[tensor_slice.start : tensor_slice.start + tensor_slice.length]
        return torch.equal((master.to(dtype) == 0).to(own.device), own)

    def _digests_at_rest(self) -> dict[str, str]:
        live = self.shards.live()
        masters = {n: self.shards.engine.master(p) for n, p in self.shards.sparse.items()}
        return {name: digest(w[~live[name].to(w.device)]) for name, w in masters.items()}


def _record(decision: Decision) -> str:
    components = {name: asdict(p) for name, p in decision.components.items()}
    said = json.dumps([components, dict(decision.log_values)], sort_keys=True)
    return hashlib.sha256(said.encode()).hexdigest()


def digest(t: Tensor) -> str:
    """Of the bytes of a tensor."""
    return hashlib.blake2b(t.cpu().numpy().tobytes(), digest_size=16).hexdigest()


def _compare(step: int, patterns: Digests, stale: list[str]) -> None:
    everyone = comm.gather_objects((patterns, stale))
    for rank, (theirs, their_stale) in enumerate(everyone):
        differ = [name for name in patterns if theirs[name] != everyone[0][0][name]]
        if differ:
            raise _apart(f"step {step}: {differ[0]} differs between rank 0 and rank {rank}")
        if their_stale:
            raise _apart(
                f"step {step}: what forward uses of {their_stale[0]} is not what rank {rank} "
                "holds as its master"
            )


def _apart(what: str) -> UserError:
    return UserError(
        f"{what}. The ranks no longer train the same model; the run stops before it is saved. Go "
        "on with --resume auto from the last checkpoint; if it happens again, suspect the memory "
        "or the network of that rank's machine.",
        shared=True,
    )
