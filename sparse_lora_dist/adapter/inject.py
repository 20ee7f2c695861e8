"""Replace linears of a loaded model with an ``AdapterLinear``.

A linear that gets an adapter is called a site.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from sparse_lora_dist.adapter.dropout import RowSeeds
from sparse_lora_dist.adapter.linear import AdapterLinear
from sparse_lora_dist.adapter.seeds import seed_of
from sparse_lora_dist.base_model.frozen_linear import FrozenLinear
from sparse_lora_dist.base_model.nf4_shard import num_elements_for
from sparse_lora_dist.methods.protocol.form import Site, TensorSpec
from sparse_lora_dist.methods.protocol.method import Method
from sparse_lora_dist.zero3.parameters import ShardBuilder
from sparse_lora_dist.zero3.slices import Values


def inject(
    model: nn.Module,
    sites: Sequence[Site],
    method: Method,
    builder: ShardBuilder,
    row_seeds: RowSeeds,
    *,
    alpha: float,
    dropout: float,
    micro_batches: int,
    initial: Mapping[str, Values],
) -> list[AdapterLinear]:
    """Replace each linear that gets an adapter (site) with an ``AdapterLinear``. Collective.

    The ``AdapterLinear`` contains the frozen linear and the adapter's sharded parameters.

    Args:
        model: loaded model, changed in place. Each site must be a ``FrozenLinear``.
        sites: names and sizes of the linears that get an adapter, in the model's order.
        method: sparse method of the run. It defines each site's tensors and delta (what the
            adapter adds to the linear's output).
        builder: makes the sharded parameters.
        row_seeds: source of the dropout masks; one instance for all adapters.
        alpha: LoRA alpha.
        dropout: probability with which an entry of an adapter's input is dropped, in [0, 1).
        micro_batches: number of micro-batches of an optimizer step on one rank.
        initial: name "site.tensor" of a trained tensor -> function that returns a range of its
            initial values. A tensor that is missing here gets the values of its
            ``TensorSpec.init``. Random values are seeded by the seed of the run and the tensor's
            name, so they are the same on any number of ranks.

    Returns:
        The adapters, in the order of ``sites``. Their kept tensors, such as masks, are written by
        the method and trained by no gradient; they are zero until the method writes them.
    """
    adapters: list[AdapterLinear] = []
    for site in sites:
        base = model.get_submodule(site.name)
        assert isinstance(base, FrozenLinear), f"{site.name} was not loaded as a frozen linear"
        form, parameters = method.form(site), {}
        for key, spec in form.tensors.items():
            if spec.shared and adapters:
                parameters[key] = getattr(adapters[0], key)
                continue
            name = f"{site.name}.{key}"
            values = initial.get(name) or _drawn(spec, seed_of(row_seeds.seed, name))
            parameters[key] = builder.parameter(spec.shape, values, trainable=True)
        for key, kept in form.kept.items():
            shape = (num_elements_for(kept.num_bytes, builder.dtype),)
            parameters[key] = builder.parameter(shape, _zeros, in_memory=True)
        adapter = AdapterLinear(
            base,
            site,
            method,
            parameters,
            alpha=alpha,
            dropout=dropout,
            row_seeds=row_seeds,
            micro_batches=micro_batches,
        )
        parent, _, leaf = site.name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, adapter)
        adapters.append(adapter)
    return adapters


def _zeros(start: int, stop: int) -> Tensor:
    return torch.zeros(stop - start)


def _drawn(spec: TensorSpec, seed: int) -> Values:
    # Each rank draws the whole tensor and cuts its range: the values must not depend on the cut.
    def values(start: int, stop: int) -> Tensor:
        whole = torch.empty(spec.shape)
        spec.init(whole, torch.Generator().manual_seed(seed))
        return whole.flatten()[start:stop]

    return values
