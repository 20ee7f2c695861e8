"""``Sites``: the adapters of a model, with the state that a sparse method keeps for each of them.

The state is the same on every rank, except that kept tensors are sharded:

- Components: which rank-1 components (row i of A with column i of B) forward computes, and how many
  of them are open, i.e. count towards the adapter's rank.
- Statistics, which the method updates at each step from its probe of each adapter. A probe is one
  number that the method computes in backward.
- Running means of the squared inputs, one for each input feature.
- Kept tensors, such as masks, which the method writes and no gradient trains.

Shapes: K statistics per site, S sites (linears that have an adapter), I in_features.
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
from sparse_lora_dist.zero3.slices import TensorSlice


class Sites:
    """All adapters of a model, with the state that the method's decisions read and change.

    Args:
        adapters: the adapters, in the model's order.
        method: sparse method of the run.
        builder: writes this rank's shards of kept tensors. May be None if no kept tensor is read or
            written.
    """

    def __init__(
        self,
        adapters: Sequence[AdapterLinear],
        method: Method,
        builder: ShardBuilder | None = None,
    ) -> None:
        self.adapters = {adapter.site.name: adapter for adapter in adapters}
        self.method, self._builder = method, builder
        self.stats = torch.zeros(method.n_site_stats, len(adapters), dtype=torch.float64)
        self.squares: dict[str, Tensor] = {}
        """Site name -> running mean of the square of each input feature, float64 [I] on this rank's
        device, the same on every rank; zero before the first step."""
        if method.rewriting is not None and method.rewriting.squares_decay is not None:
            for site in (a.site for a in adapters):
                nothing_I = torch.zeros(site.in_features, dtype=torch.float64)
                self.squares[site.name] = nothing_I.to(comm.device())

    def tensors(self) -> set[str]:
        """Return the names of all trained tensors of the adapters, as "site.tensor"."""
        return {f"{name}.{key}" for name, a in self.adapters.items() for key in a.specs}

    def observe(self) -> None:
        """Update the method's statistics of all sites from the probes of this step. Collective.

        Must be called once a step, after its last backward. Makes one all-reduce of one float64
        number per adapter, or does nothing if the method has no ``observe_sites``.
        """
        if self.method.observe_sites is None:
            return
        probes = [torch.as_tensor(a.probed, device=comm.device()) for a in self._in_order()]
        probed_S = torch.stack([probe.double() for probe in probes])
        # Averaged over ranks, as gradients are.
        probed_S = comm.sum_over_ranks(probed_S) / comm.world_size()
        self.stats = self.method.observe_sites(self.stats, probed_S.cpu())
        self.reset_probes()

    def reset_probes(self) -> None:
        """Set every adapter's sum of probes to 0.0 on this rank, for the next step."""
        for adapter in self._in_order():
            adapter.probed = 0.0

    def stop_probing(self) -> None:
        """Make backward compute no more probes, for the rest of the run."""
        for adapter in self._in_order():
            adapter.probe = None

    def tensor_slice(self, slices: Mapping[str, TensorSlice], site: str, key: str) -> TensorSlice:
        """Return this rank's slice of a site's trained tensor.

        A tensor that all sites share has one slice, under the first site's name.

        Args:
            slices: name "site.tensor" -> this rank's slice of the trained tensor.
            site: name of the site.
            key: name of the tensor within the site.
        """
        first = next(iter(self.adapters)) if self.adapters[site].specs[key].shared else site
        return slices[f"{first}.{key}"]

    def kept(self) -> dict[str, tuple[nn.Parameter, KeptSpec]]:
        """Return name "site.tensor" -> (sharded parameter, its shape and dtype) of kept tensors."""
        return {
            f"{name}.{key}": (getattr(a, key), spec)
            for name, a in self.adapters.items()
            for key, spec in a.form.kept.items()
        }

    def put_kept(self, adapter: AdapterLinear, key: str, t: Tensor) -> None:
        """Store this rank's shard of a site's kept tensor. Collective.

        Args:
            adapter: adapter of the site.
            key: name of the tensor within the site.
            t: whole tensor of the spec's shape and dtype, the same on every rank.
        """
        spec = adapter.form.kept[key]
        assert (tuple(t.shape), t.dtype) == (spec.shape, spec.dtype), (key, t.shape, t.dtype)
        raw = t.contiguous().view(-1).view(torch.uint8)
        first, last = self.own_kept_bytes(spec)
        self.fill_kept(getattr(adapter, key), raw[first:last])

    def own_kept_bytes(self, spec: KeptSpec) -> tuple[int, int]:
        """Return (start, stop), the range of a kept tensor's bytes that this rank holds, which may
        be empty.

        Args:
            spec: shape and dtype of the kept tensor.
        """
        return own_bytes(spec.num_bytes, self._filler.dtype)

    def fill_kept(self, parameter: nn.Parameter, raw: Tensor) -> None:
        """Store this rank's bytes of a kept tensor. It is collective if ZeRO++'s hpZ is on.

        Args:
            parameter: sharded parameter of the kept tensor.
            raw: the tensor's bytes in the range that ``own_kept_bytes`` returns, uint8, 1-D.
        """
        own = as_parameter_dtype(raw, self._filler.dtype)
        self._filler.refill(parameter, lambda start, stop: own)

    @property
    def _filler(self) -> ShardBuilder:
        assert self._builder is not None, "a Sites without a builder cannot write kept tensors"
        return self._builder

    def _in_order(self) -> Iterable[AdapterLinear]:
        return self.adapters.values()

    def set_components(self, components: Mapping[str, Components]) -> None:
        """Set which rank-1 components the named sites compute from the next forward on.

        All ranks must pass the same. Not a collective.

        Args:
            components: site name -> indices of the components that forward computes, and number of
                open ones, which count towards the rank. Sites that are not named do not change.
        """
        for name, now in components.items():
            self.adapters[name].set_components(now)

    def ranks(self) -> dict[str, int]:
        """Return site name -> rank of the site, which is its number of open components."""
        return {name: adapter.components.open for name, adapter in self.adapters.items()}

    def as_json(self) -> dict[str, Any]:
        """Return components, statistics and shapes for a checkpoint's manifest, as JSON values.

        Returns:
            The same on every rank. "shapes": site name -> [in_features, out_features, rank], for
            programs that read a checkpoint without a model. "pieces": site name -> [list of the
            indices of the computed components, number of open ones]. "stats": statistics of the
            probes, one list for each statistic, with one number per site.
        """
        components = {name: adapter.components for name, adapter in self.adapters.items()}
        linears = {name: adapter.site for name, adapter in self.adapters.items()}
        return {
            "shapes": {n: [s.in_features, s.out_features, s.rank] for n, s in linears.items()},
            "pieces": {name: [list(p.computed), p.open] for name, p in components.items()},
            "stats": self.stats.tolist(),
        }

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Set components and statistics to those of a checkpoint. All ranks must pass the same.

        Args:
            saved: what ``as_json`` returned when the checkpoint was saved.
        """
        self.set_components(
            {n: Components(computed=tuple(c), open=o) for n, (c, o) in saved["pieces"].items()}
        )
        self.stats = torch.tensor(saved["stats"], dtype=torch.float64).view(self.stats.shape)
