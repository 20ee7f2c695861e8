"""Compute the tensors of all adapters anew, at the steps that the method's ``Rewriting`` names.

A site is a linear that has an adapter. A rewriting gathers one site at a time. Rank 0 computes its
new tensors as a whole and broadcasts them, and each rank stores its shard.

Shapes: I in_features, O out_features, S sites, K numbers measured of each site.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from math import prod
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from sparse_lora_dist.adapter.input_statistics import InputStatistics
from sparse_lora_dist.adapter.linear import AdapterLinear
from sparse_lora_dist.adapter.seeds import seed_of
from sparse_lora_dist.distributed import comm
from sparse_lora_dist.distributed.console import print_line
from sparse_lora_dist.errors import UserError
from sparse_lora_dist.methods.protocol.method import Components, Decision
from sparse_lora_dist.methods.protocol.rewriting import Rewriting, Rewritten, Share, Whole
from sparse_lora_dist.sparsity.shards import Shards
from sparse_lora_dist.zero3.parameters import gathered
from sparse_lora_dist.zero3.slices import as_shard, shard_of


class Rewriter:
    """Rewrites the sites if the method has a ``Rewriting``; does nothing for other methods.

    Call ``begin`` once before a new run's first step, and in each step ``collect_inputs`` before
    the first forward and ``after`` at the end.

    Args:
        shards: this rank's shards of the trained tensors, which a rewriting changes.
        seed: seed of the run. Random values for a site are seeded by (seed, site, step).
    """

    def __init__(self, shards: Shards, seed: int) -> None:
        self.shards, self.seed = shards, seed
        self.rewriting: Rewriting | None = shards.method.rewriting
        self.adapters = list(shards.sites.adapters.values())

    def begin(self) -> None:
        """Rewrite all sites before step 1 of a new run, if the method asks for it. Collective.

        Must not be called for a resumed run.
        """
        if self.rewriting is not None and self.rewriting.at(0):
            self._rewrite(self.rewriting, 0)

    def collect_inputs(self, step: int) -> None:
        """Make the adapters collect the input statistics that the method needs from this step.

        Must be called on all ranks before the step's first forward. Each adapter that has to
        collect gets a new ``InputStatistics``, which its backwards fill.

        Args:
            step: optimizer step, counted from 1.
        """
        now = self.rewriting
        if now is None:
            return
        rows = now.collects_rows is not None and now.collects_rows(step)
        squares = now.squares_decay is not None
        for i, adapter in enumerate(self.adapters):
            gradient = now.collects_gradient is not None and now.collects_gradient(step, i)
            if squares or gradient or rows:
                adapter.input_statistics = InputStatistics(
                    squares=squares, gradient=gradient, rows=rows
                )

    def after(self, step: int, *, applied: bool) -> Decision | None:
        """Update the running means of squared inputs; rewrite all sites if it is due. Collective.

        Must be called after the engine's step. The step's input statistics are freed.

        Args:
            step: optimizer step, counted from 1.
            applied: True if the engine applied the step; False if its gradient was not finite.

        Returns:
            Decision with the sites' new components and the numbers to log, means over the sites;
            None if no rewriting was due.

        Raises:
            UserError: on all ranks, if the method needed the gradients or inputs of a step that was
                not applied, or if the method failed on rank 0.
        """
        now = self.rewriting
        if now is None:
            return None
        if applied and now.squares_decay is not None:
            self._update_mean_squares(now.squares_decay)
        statistics = [
            adapter.input_statistics
            for adapter in self.adapters
            if adapter.input_statistics is not None
        ]
        if not applied and any(statistics.gradient or statistics.rows for statistics in statistics):
            raise UserError(
                f"--method {self.shards.method.name} selects weights by the gradients or inputs of "
                f"step {step}, but the loss or gradient of this step is not finite. Lower "
                "--learning_rate, or check the data.",
                shared=True,
            )
        decision = self._rewrite(now, step) if now.at(step) else None
        for adapter in self.adapters:
            adapter.input_statistics = None
        return decision

    def _update_mean_squares(self, decay: float) -> None:
        """Update every site's running mean of squared inputs. Collective: one all-reduce in all.

        The new mean is decay * old mean + (1 - decay) * mean over this step's tokens.

        Args:
            decay: weight of the old mean, in [0, 1).
        """
        statistics = [a.input_statistics for a in self.adapters if a.input_statistics is not None]
        sums = [torch.as_tensor(w.squares_I, device=comm.device()).double() for w in statistics]
        widths = [a.site.in_features for a in self.adapters]
        sums = [s.expand(width) for s, width in zip(sums, widths, strict=True)]
        counts = torch.tensor([w.num_tokens for w in statistics], device=comm.device()).double()
        everything = comm.sum_over_ranks(torch.cat([*sums, counts]))
        *parts, counts_S = everything.split([*widths, len(statistics)])
        running = self.shards.sites.squares
        for adapter, sum_I, count in zip(self.adapters, parts, counts_S, strict=True):
            mean_I, before_I = sum_I / count.clamp(min=1.0), running[adapter.site.name]
            # torch.where, not ``if``: an ``if`` would wait for the GPU at each site.
            weight = torch.where(before_I.any(), decay, 0.0)
            running[adapter.site.name] = weight * before_I + (1 - weight) * mean_I

    def _rewrite(self, now: Rewriting, step: int) -> Decision:
        """Rewrite all sites, one after another. Collective.

        Args:
            now: the method's rewriting.
            step: number of optimizer steps done; 0 before training.

        Returns:
            Decision with the sites' new components and the numbers to log, means over the sites.
        """
        measures_SK = None
        if now.measure is not None:
            asked = partial(_measured, now.measure)
            told = [self._ask_about_site(now, asked, i, step) for i in range(len(self.adapters))]
            measures_SK = torch.stack([t.tensors["measured"] for t in told]).double().cpu()
        said: dict[str, list[Any]] = defaultdict(list)
        components, trained = {}, False
        for i, adapter in enumerate(self.adapters):
            done = self._ask_about_site(now, now.write, i, step, measures_SK)
            trained |= self._put(adapter, done)
            adapter.input_statistics = None  # frees its share of the gradient
            for name, value in done.log_values.items():
                said[name].append(value)
            if done.computed is not None:
                computed = Components(computed=done.computed, open=len(done.computed))
                components[adapter.site.name] = computed
        if trained:
            self.shards.engine.masters_changed()
        if now.resets_moments:
            self.shards.reset_moments(adapters_only=True)
        self.shards.sites.set_components(components)
        log_values = {name: over_sites(values) for name, values in said.items()}
        self.shards.log_values = log_values
        if log_values and now.says:
            print_line(
                "",
                f"step {step}: {', '.join(f'{n} {value:.4g}' for n, value in log_values.items())}",
            )
        return Decision(components=components, log_values=log_values)

    @torch.no_grad()
    def _ask_about_site(
        self,
        now: Rewriting,
        ask: Callable[[Whole], Rewritten],
        index: int,
        step: int,
        measures_SK: Tensor | None = None,
    ) -> Rewritten:
        """Gather one site's tensors, and return what ``ask`` computes from them on rank 0.

        Collective.

        Args:
            now: the method's rewriting.
            ask: function of the gathered site that returns tensors, such as ``now.write``.
            index: index of the site in ``adapters``.
            step: number of optimizer steps done; 0 before training.
            measures_SK: results of ``now.measure`` for all sites, K numbers for each of S sites,
                float64; None if they were not measured.

        Returns:
            The result of ``ask`` on rank 0, the same on every rank, with tensors on its device.
        """
        adapter = self.adapters[index]
        site, statistics = adapter.site, adapter.input_statistics
        kept = [getattr(adapter, key) for key in adapter.form.kept]
        base = list(adapter.base.parameters()) if now.reads_weight else []
        with gathered([*kept, *base]):
            trained = {key: self._master(adapter, key) for key in adapter.specs}
            drawn = adapter.form.drawn(adapter.seed, comm.device())
            squares = self.shards.sites.squares.get(site.name)
            whole = Whole(
                site=site,
                index=index,
                step=step,
                tensors=trained | adapter.kept() | drawn,
                scale=adapter.scale,
                weight_OI=lambda: adapter.base.weight_OI(torch.float32),
                generator=torch.Generator().manual_seed(seed_of(self.seed, site.name, step)),
                squares_I=squares if squares is not None and squares.any() else None,
                gradient_OI=_gradient(adapter, statistics),
                rows_NI=statistics.gathered_rows()
                if statistics is not None and statistics.rows
                else None,
                measures_SK=measures_SK,
            )
            return _answer_of_rank_0(ask, whole)

    def _master(self, adapter: AdapterLinear, key: str) -> Tensor:
        """Return a site's trained tensor, whole and fp32, gathered from the masters. Collective.

        Args:
            adapter: adapter of the site.
            key: name of the tensor within the site.
        """
        tensor_slice = self.shards.sites.tensor_slice(self.shards.sparse, adapter.site.name, key)
        return _gathered_from(
            self.shards.engine.master(tensor_slice), tensor_slice.share, tensor_slice.shape
        )

    def _put(self, adapter: AdapterLinear, done: Rewritten) -> bool:
        """Write this rank's shards of a site's new tensors. Collective.

        The shard of a trained tensor goes into its fp32 master, that of a kept tensor into the
        parameter itself.

        Args:
            adapter: adapter of the site.
            done: the site's new tensors by their name within the site, whole and the same on every
                rank.

        Returns:
            True if a trained tensor was among them. The caller must then let the engine copy the
            fp32 masters into the parameters.
        """
        for key, t in done.tensors.items():
            if key in adapter.specs:
                tensor_slice = self.shards.sparse[f"{adapter.site.name}.{key}"]
                assert t.shape == tensor_slice.shape, (key, t.shape, tensor_slice.shape)
                own = t.flatten()[tensor_slice.start : tensor_slice.start + tensor_slice.length]
                self.shards.engine.master(tensor_slice).copy_(own)
            else:
                self.shards.sites.put_kept(adapter, key, t)
        return any(key in adapter.specs for key in done.tensors)


def _measured(measure: Callable[[Whole], Tensor], whole: Whole) -> Rewritten:
    return Rewritten(tensors={"measured": measure(whole)})


def over_sites(values: Sequence[Any]) -> float:
    """Return the mean of one number of all sites; of shares, the share of all together.

    Args:
        values: the number of each site: floats, or ``Share`` for all of them.
    """
    if not isinstance(values[0], Share):
        return fmean(values)
    parts, wholes = zip(*values, strict=True)
    return float(sum(parts) / sum(wholes))


def _answer_of_rank_0(ask: Callable[[Whole], Rewritten], whole: Whole) -> Rewritten:
    """Call ``ask(whole)`` on rank 0 and return its result on every rank. Collective.

    If each rank computed it, machines might round differently or give a singular vector the other
    sign, and shards of two different results do not fit together.

    Args:
        ask: function of a gathered site that returns tensors.
        whole: the gathered site.

    Raises:
        UserError: on all ranks, if ``ask`` fails on rank 0.
    """
    own, failure = Rewritten(), None
    if comm.rank() == 0:
        try:
            own = ask(whole)
        except Exception as error:  # any kind: the other ranks wait for an answer
            failure = (
                f"At step {whole.step}, rank 0 could not compute new tensors of the adapter of "
                f"{whole.site.name}. {type(error).__name__}: {error}"
            )
    kinds = {key: (tuple(t.shape), t.dtype) for key, t in own.tensors.items()}
    said = comm.broadcast_object((failure, kinds, own.computed, dict(own.log_values)))
    failure, kinds, computed, log_values = said
    if failure is not None:
        raise UserError(failure, shared=True)
    tensors = {}
    for key, (shape, dtype) in kinds.items():
        t = own.tensors[key] if comm.rank() == 0 else torch.empty(shape, dtype=dtype)
        tensors[key] = comm.broadcast(t.to(comm.device()).contiguous())
    return Rewritten(tensors=tensors, computed=computed, log_values=log_values)


def _gradient(adapter: AdapterLinear, statistics: InputStatistics | None) -> Tensor | None:
    """Return the gradient of the loss with respect to a site's frozen weight. Collective.

    Args:
        adapter: adapter of the site.
        statistics: input statistics of the site in this step.

    Returns:
        fp32 [O, I], gathered from all ranks; None if it was not collected.
    """
    if statistics is None or not isinstance(statistics.gradient_share, Tensor):
        return None
    shape = adapter.site.out_features, adapter.site.in_features
    return _gathered_from(statistics.gradient_share, shard_of(prod(shape)), shape)


def _gathered_from(own: Tensor, share: int, shape: tuple[int, ...]) -> Tensor:
    """Gather a tensor from its shards. Collective.

    Args:
        own: this rank's shard, 1-D, without padding.
        share: length of each rank's shard, padding included; the same on every rank.
        shape: shape of the whole tensor.

    Returns:
        The whole tensor on every rank, in the dtype of ``own``.
    """
    padded = as_shard(own, share, own.dtype, comm.device())
    return comm.all_gather_flat(padded, prod(shape)).view(shape)
