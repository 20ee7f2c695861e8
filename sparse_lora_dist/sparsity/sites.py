"""The adapted linears as a method's decisions see them: which components each computes, what was
probed in its backward. The same on every rank.

Shapes: K statistics a site, S sites.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparse_lora_dist.adapter.linear import AdapterLinear
from sparse_lora_dist.base_model.nf4_shard import as_parameter_dtype, own_bytes
from sparse_lora_dist.distributed import comm
from sparse_lora_dist.methods.protocol.form import KeptSpec
from sparse_lora_dist.methods.protocol.method import Components, Method
from sparse_lora_dist.zero3.parameters import ShardBuilder
from sparse_lora_dist.zero3.shares import TensorSlice


class Sites:
    """Every adapter of the model, in its order."""

    def __init__(
        self,
        adapters: Sequence[AdapterLinear],
        method: Method,
        builder: ShardBuilder | None = None,
    ) -> None:
        """``builder``: of who fills kept tensors."""
        self.adapters = {adapter.site.name: adapter for adapter in adapters}
        self.method, self._builder = method, builder
        self.stats = torch.zeros(method.n_site_stats, len(adapters), dtype=torch.float64)
        self.squares: dict[str, Tensor] = {}
        """Site -> running mean of its squared inputs, float64 [I]; zero before the first step."""
        if method.rewriting is not None and method.rewriting.squares_decay is not None:
            for site in (a.site for a in adapters):
                nothing_I = torch.zeros(site.in_features, dtype=torch.float64)
                self.squares[site.name] = nothing_I.to(comm.device())

    def tensors(self) -> set[str]:
        """Names of the adapters' tensors, "site.tensor"."""
        return {f"{name}.{key}" for name, a in self.adapters.items() for key in a.specs}

    def observe(self) -> None:
        """Bring this step's probes together. One all-reduce of a number a site, or nothing."""
        if self.method.observe_sites is None:
            return
        probes = [torch.as_tensor(a.probed, device=comm.device()) for a in self._in_order()]
        probed_S = torch.stack([probe.double() for probe in probes])
        # Ranks are averaged, as their gradients are.
        probed_S = comm.sum_over_ranks(probed_S) / comm.world_size()
        self.stats = self.method.observe_sites(self.stats, probed_S.cpu())
        self.reset_probes()

    def reset_probes(self) -> None:
        """This step's probes are brought together, or of no use."""
        for adapter in self._in_order():
            adapter.probed = 0.0

    def stop_probing(self) -> None:
        """Nobody asks for probes any more."""
        for adapter in self._in_order():
            adapter.probe = None

    def tensor_slice(self, slices: Mapping[str, TensorSlice], site: str, key: str) -> TensorSlice:
        """A trained tensor's slice: the site's own, or the first one's where all share it."""
        first = next(iter(self.adapters)) if self.adapters[site].specs[key].shared else site
        return slices[f"{first}.{key}"]

    def kept(self) -> dict[str, tuple[nn.Parameter, KeptSpec]]:
        """Kept tensors as they are sharded, "site.tensor"."""
        return {
            f"{name}.{key}": (getattr(a, key), spec)
            for name, a in self.adapters.items()
            for key, spec in a.form.kept.items()
        }

    def put_kept(self, adapter: AdapterLinear, key: str, t: Tensor) -> None:
        """A kept tensor anew, of which each rank takes its share. Collective."""
        spec = adapter.form.kept[key]
        assert (tuple(t.shape), t.dtype) == (spec.shape, spec.dtype), (key, t.shape, t.dtype)
        raw = t.contiguous().view(-1).view(torch.uint8)
        first, last = self.own_kept(spec)
        self.fill_kept(getattr(adapter, key), raw[first:last])

    def own_kept(self, spec: KeptSpec) -> tuple[int, int]:
        """Which bytes of it are this rank's: from, to."""
        return own_bytes(spec.num_bytes, self._filler.dtype)

    def fill_kept(self, parameter: nn.Parameter, raw: Tensor) -> None:
        """With this rank's bytes, uint8. Collective under hpZ."""
        own = as_parameter_dtype(raw, self._filler.dtype)
        self._filler.refill(parameter, lambda start, stop: own)

    @property
    def _filler(self) -> ShardBuilder:
        assert self._builder is not None, "these sites were made to be read"
        return self._builder

    def _in_order(self) -> Iterable[AdapterLinear]:
        return self.adapters.values()

    def set_components(self, components: Mapping[str, Components]) -> None:
        """What the named sites compute from now on."""
        for name, now in components.items():
            self.adapters[name].set_components(now)

    def ranks(self) -> dict[str, int]:
        """Open components of every site."""
        return {name: adapter.components.open for name, adapter in self.adapters.items()}

    def as_json(self) -> dict[str, Any]:
        """What ``restore`` takes, and for who has no model the shape (I, O, R) of each."""
        components = {name: adapter.components for name, adapter in self.adapters.items()}
        linears = {name: adapter.site for name, adapter in self.adapters.items()}
        return {
            "shapes": {n: [s.in_features, s.out_features, s.rank] for n, s in linears.items()},
            "pieces": {name: [list(p.computed), p.open] for name, p in components.items()},
            "stats": self.stats.tolist(),
        }

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Put back what ``as_json`` gave."""
        self.set_components(
            {n: Components(computed=tuple(c), open=o) for n, (c, o) in saved["pieces"].items()}
        )
        self.stats = torch.tensor(saved["stats"], dtype=torch.float64).view(self.stats.shape)
