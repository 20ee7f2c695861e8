"""Has a method write tensors of its sites anew, when it is time: one site whole at a time, as rank
0 writes it, of which each rank keeps its share.

Shapes: I in_features, O out_features, S sites.
"""

from collections import defaultdict
from collections.abc import Callable
from functools import partial
from math import prod
from statistics import fmean

import torch
from torch import Tensor

from sparse_lora_dist.adapter.input_statistics import InputStatistics
from sparse_lora_dist.adapter.linear import AdapterLinear
from sparse_lora_dist.adapter.seeds import seed_of
from sparse_lora_dist.distributed import comm
from sparse_lora_dist.distributed.console import print_line
from sparse_lora_dist.errors import UserError
from sparse_lora_dist.methods.protocol.method import Components, Decision
from sparse_lora_dist.methods.protocol.rewriting import Rewriting, Rewritten, Whole
from sparse_lora_dist.sparsity.shards import Shards
from sparse_lora_dist.zero3.parameters import gathered
from sparse_lora_dist.zero3.shares import as_share, share_of


class Rewriter:
    """Does nothing for a method that rewrites nothing."""

    def __init__(self, shards: Shards, seed: int) -> None:
        self.shards, self.seed = shards, seed
        self.rewriting: Rewriting | None = shards.method.rewriting
        self.adapters = list(shards.sites.adapters.values())

    def begin(self) -> None:
        """Before the first step of a run that goes on from nothing. Collective."""
        if self.rewriting is not None and self.rewriting.at(0):
            self._rewrite(self.rewriting, 0)

    def collect_inputs(self, step: int) -> None:
        """Before the forward of a step: look at what will be asked for."""
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
        """After a step, or one that was refused; what the log is to say. Collective.

        Raises:
            UserError: it was to choose by a gradient or inputs that are not finite.
        """
        now = self.rewriting
        if now is None:
            return None
        if applied and now.squares_decay is not None:
            self._take_squares(now.squares_decay)
        statistics = [
            adapter.input_statistics
            for adapter in self.adapters
            if adapter.input_statistics is not None
        ]
        if not applied and any(statistics.gradient or statistics.rows for statistics in statistics):
            raise UserError(
                f"step {step}: --method {self.shards.method.name} was to choose by a step that "
                "is not finite. Lower --learning_rate, or take other data.",
                shared=True,
            )
        decision = self._rewrite(now, step) if now.at(step) else None
        for adapter in self.adapters:
            adapter.input_statistics = None
        return decision

    def _take_squares(self, decay: float) -> None:
        """One all-reduce of the numbers of all sites."""
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
            # Not ``if``, which would wait for the GPU at each site.
            weight = torch.where(before_I.any(), decay, 0.0)
            running[adapter.site.name] = weight * before_I + (1 - weight) * mean_I

    def _rewrite(self, now: Rewriting, step: int) -> Decision:
        measures_SK = None
        if now.measure is not None:
            asked = partial(_measured, now.measure)
            told = [self._of_whole(now, asked, i, step) for i in range(len(self.adapters))]
            measures_SK = torch.stack([t.tensors["measured"] for t in told]).double().cpu()
        said, components, trained = defaultdict(list), {}, False
        for i, adapter in enumerate(self.adapters):
            done = self._of_whole(now, now.write, i, step, measures_SK)
            trained |= self._put(adapter, done)
            adapter.input_statistics = None  # a share of a whole gradient may go with it
            for name, value in done.log_values.items():
                said[name].append(value)
            if done.computed is not None:
                computed = Components(computed=done.computed, open=len(done.computed))
                components[adapter.site.name] = computed
        if trained:
            self.shards.engine.masters_changed()
        if now.resets_moments:
            self.shards.optimizer.reset_moments()
        self.shards.sites.set_components(components)
        log_values = {name: fmean(values) for name, values in said.items()}
        self.shards.log_values = log_values
        if log_values and now.says:
            print_line(
                "",
                f"step {step}: {', '.join(f'{n} {value:.4g}' for n, value in log_values.items())}",
            )
        return Decision(components=components, log_values=log_values)

    @torch.no_grad()
    def _of_whole(
        self,
        now: Rewriting,
        ask: Callable[[Whole], Rewritten],
        index: int,
        step: int,
        measures_SK: Tensor | None = None,
    ) -> Rewritten:
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
            return _as_rank_0_has_it(ask, whole)

    def _master(self, adapter: AdapterLinear, key: str) -> Tensor:
        """A trained tensor in fp32, whole."""
        tensor_slice = self.shards.sites.tensor_slice(self.shards.sparse, adapter.site.name, key)
        return _whole_of(
            self.shards.engine.master(tensor_slice), tensor_slice.share, tensor_slice.shape
        )

    def _put(self, adapter: AdapterLinear, done: Rewritten) -> bool:
        """Every rank its share; was a trained tensor among them?"""
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


def _as_rank_0_has_it(ask: Callable[[Whole], Rewritten], whole: Whole) -> Rewritten:
    """Other machines might round otherwise, or give a singular vector another sign, and shares of
    two answers are no answer. Collective."""
    own, failure = Rewritten(), None
    if comm.rank() == 0:
        try:
            own = ask(whole)
        except Exception as error:  # of whatever kind: no rank is to wait for an answer
            failure = f"step {whole.step}, {whole.site.name}: {type(error).__name__}: {error}"
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
    """[O, I], while it is asked for."""
    if statistics is None or not isinstance(statistics.gradient_share, Tensor):
        return None
    shape = adapter.site.out_features, adapter.site.in_features
    return _whole_of(statistics.gradient_share, share_of(prod(shape)), shape)


def _whole_of(own: Tensor, share: int, shape: tuple[int, ...]) -> Tensor:
    """From every rank's part, of which ``share`` is the largest. Collective."""
    padded = as_share(own, share, own.dtype, comm.device())
    return comm.all_gather_flat(padded, prod(shape)).view(shape)
