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

from sparse_lora_dist.adapter.input_statistics import Watch
from sparse_lora_dist.adapter.linear import AdapterLinear
from sparse_lora_dist.adapter.seeds import seed_of
from sparse_lora_dist.distributed import comm
from sparse_lora_dist.distributed.console import say
from sparse_lora_dist.errors import UserError
from sparse_lora_dist.methods.protocol.method import Decision, Pieces
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

    def watch(self, step: int) -> None:
        """Before the forward of a step: look at what will be asked for."""
        now = self.rewriting
        if now is None:
            return
        rows = now.collects_rows is not None and now.collects_rows(step)
        squares = now.squares_decay is not None
        for i, adapter in enumerate(self.adapters):
            gradient = now.collects_gradient is not None and now.collects_gradient(step, i)
            if squares or gradient or rows:
                adapter.watch = Watch(squares=squares, gradient=gradient, rows=rows)

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
        watches = [adapter.watch for adapter in self.adapters if adapter.watch is not None]
        if not applied and any(watch.gradient or watch.rows for watch in watches):
            raise UserError(
                f"step {step}: --method {self.shards.method.name} was to choose by a step that "
                "is not finite. Lower --learning_rate, or take other data.",
                shared=True,
            )
        decision = self._rewrite(now, step) if now.at(step) else None
        for adapter in self.adapters:
            adapter.watch = None
        return decision

    def _take_squares(self, decay: float) -> None:
        """One all-reduce of the numbers of all sites."""
        watches = [a.watch for a in self.adapters if a.watch is not None]
        sums = [torch.as_tensor(w.squares_I, device=comm.device()).double() for w in watches]
        widths = [a.site.in_features for a in self.adapters]
        sums = [s.expand(width) for s, width in zip(sums, widths, strict=True)]
        counts = torch.tensor([w.num_tokens for w in watches], device=comm.device()).double()
        everything = comm.sum_over_ranks(torch.cat([*sums, counts]))
        *parts, counts_S = everything.split([*widths, len(watches)])
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
        said, pieces, trained = defaultdict(list), {}, False
        for i, adapter in enumerate(self.adapters):
            done = self._of_whole(now, now.write, i, step, measures_SK)
            trained |= self._put(adapter, done)
            adapter.watch = None  # a share of a whole gradient may go with it
            for name, value in done.facts.items():
                said[name].append(value)
            if done.computed is not None:
                computed = Pieces(computed=done.computed, open=len(done.computed))
                pieces[adapter.site.name] = computed
        if trained:
            self.shards.engine.masters_changed()
        if now.resets_moments:
            self.shards.optimizer.reset_moments()
        self.shards.sites.set_pieces(pieces)
        facts = {name: fmean(values) for name, values in said.items()}
        self.shards.facts = facts
        if facts and now.says:
            say("", f"step {step}: {', '.join(f'{n} {value:.4g}' for n, value in facts.items())}")
        return Decision(pieces=pieces, facts=facts)

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
        site, watch = adapter.site, adapter.watch
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
                gradient_OI=_gradient(adapter, watch),
                rows_NI=watch.gathered_rows() if watch is not None and watch.rows else None,
                measures_SK=measures_SK,
            )
            return _as_rank_0_has_it(ask, whole)

    def _master(self, adapter: AdapterLinear, key: str) -> Tensor:
        """A trained tensor in fp32, whole."""
        piece = self.shards.sites.piece(self.shards.sparse, adapter.site.name, key)
        return _whole_of(self.shards.engine.master(piece), piece.share, piece.shape)

    def _put(self, adapter: AdapterLinear, done: Rewritten) -> bool:
        """Every rank its share; was a trained tensor among them?"""
        for key, t in done.tensors.items():
            if key in adapter.specs:
                piece = self.shards.sparse[f"{adapter.site.name}.{key}"]
                assert t.shape == piece.shape, (key, t.shape, piece.shape)
                own = t.flatten()[piece.start : piece.start + piece.length]
                self.shards.engine.master(piece).copy_(own)
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
    said = comm.broadcast_object((failure, kinds, own.computed, dict(own.facts)))
    failure, kinds, computed, facts = said
    if failure is not None:
        raise UserError(failure, shared=True)
    tensors = {}
    for key, (shape, dtype) in kinds.items():
        t = own.tensors[key] if comm.rank() == 0 else torch.empty(shape, dtype=dtype)
        tensors[key] = comm.broadcast(t.to(comm.device()).contiguous())
    return Rewritten(tensors=tensors, computed=computed, facts=facts)


def _gradient(adapter: AdapterLinear, watch: Watch | None) -> Tensor | None:
    """[O, I], while it is asked for."""
    if watch is None or not isinstance(watch.gradient_share, Tensor):
        return None
    shape = adapter.site.out_features, adapter.site.in_features
    return _whole_of(watch.gradient_share, share_of(prod(shape)), shape)


def _whole_of(own: Tensor, share: int, shape: tuple[int, ...]) -> Tensor:
    """From every rank's part, of which ``share`` is the largest. Collective."""
    padded = as_share(own, share, own.dtype, comm.device())
    return comm.all_gather_flat(padded, prod(shape)).view(shape)
