"""``SparseAdamW``: AdamW on ZeRO-3's flat fp32 shards, with moments for live entries only.

An entry of a tensor is live if the optimizer steps it, and dead otherwise.

DeepSpeed passes ``step`` one flat shard at a time. A flat shard holds this rank's parts of many
tensors one after another, cut anywhere, so all work here is elementwise: the live entries are
picked, stepped, projected (e.g. soft-thresholded, if the method does so) and written back. Dead
entries keep their values unless ``zero_after_step`` sets them to zero. All of it happens inside
``step``, so the low-precision copy that DeepSpeed makes right after ``step`` is up to date.

A flat shard is worked on in chunks of ``CHUNK`` entries, each with a ``Packed`` state of its own:

    flat shard    | chunk 0: 262,144 entries | chunk 1: 262,144 | ... | last chunk: the rest |

Stepping needs scratch memory per entry, and so does re-packing, i.e. building the state anew when
other entries become live. Working on one chunk at a time bounds it.

The birth step of an entry is the number of steps that were done when it became live. E.g. a
decision made during step 20, before the engine's step, makes an entry live: 19 steps are done, so
its birth step is 19. Step 20 is the first that it takes part in, at age 20 - 19 = 1. An entry that
becomes dead loses its moments. If it becomes live again, its moments start at zero, with a new
birth step.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparse_lora_dist.methods.protocol.form import Update
from sparse_lora_dist.optim.moments import MOMENTS, Packed

CHUNK = 2**18
"""Number of entries that are stepped and re-packed at a time. A multiple of 8, so that the live
bits of a chunk fill whole bytes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StateBytes:
    """Bytes of optimizer state on this rank: moments, live bits and birth steps of all chunks."""

    now: int
    """Bytes held at present."""
    peak: int
    """Most bytes held so far, without the extra memory that building a chunk's state anew takes."""
    repacking: int
    """Most bytes held so far while a chunk's state was built anew. The figure counts all state, the
    chunk's new state, and the mask, moments and birth steps of all its entries."""


class SparseAdamW(torch.optim.Optimizer):
    """AdamW that steps live entries only (Loshchilov & Hutter 2019, arXiv:1711.05101).

    The arithmetic is that of torch.optim.AdamW, followed by the method's projection of the updated
    values, such as soft thresholding or clamping, if it has one. For an entry w with gradient g,
    moments m and v, and learning rate lr:

        w <- (1 - lr * weight_decay) w
        m <- lerp(m, g, 1 - beta1)            v <- beta2 v + (1 - beta2) g^2
        denominator = sqrt(v) / sqrt(1 - beta2^age) + eps
        w <- w - lr / (1 - beta1^age) * m / denominator
        w <- project(w, Update(step, lr, denominator))

    ``age`` is the number of steps since the entry's birth step (the number of steps done when it
    became live), not the step of the run. The reason: bias correction makes up for moments that
    start at zero, and those of an entry start at its birth step. With the run's step, an entry that
    becomes live late would get almost no correction. With betas 0.9 and 0.999, at its first step
    m = 0.1 g and sqrt(v) = 0.032 |g|, so it would move by 3.2 lr instead of lr.

    Keys of a param group besides Adam's:
        rate: function (birth step of entries) -> their learning rate in the current step; None
            uses ``lr`` for all entries.
        lr_factor: multiplies the learning rate.
        project: function (updated values, ``Update``) -> projected values, called at the end of
            each update; None for no projection.

    Keys of a flat shard's state:
        step: number of steps it has done.
        chunks: one ``Packed`` per chunk.
        zero: mask of entries that become zero at the end of its next step. The key is absent if
            there are none.

    A flat shard has no live entries until ``set_live`` or ``restore``. No method is collective: all
    of them work on this rank's flat shards alone.

    Args:
        params: parameters or param groups, as for any torch optimizer.
        lr: learning rate of groups whose ``rate`` is None.
        weight_decay: decoupled weight decay.
        betas: decay rates of the two moments.
        eps: added to the denominator.
        eight_bit: True to store moments in 8 bits, False for fp32.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        *,
        lr: float,
        weight_decay: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        eight_bit: bool = False,
    ) -> None:
        adam = {"lr": lr, "weight_decay": weight_decay, "betas": betas, "eps": eps}
        super().__init__(params, adam | {"rate": None, "lr_factor": 1.0, "project": None})
        self.eight_bit = eight_bit
        self._peak = self._repacking = 0

    def set_live(self, flat: Tensor, live: Tensor) -> None:
        """Set which entries of a flat shard are live, i.e. stepped from now on.

        Entries that were live before keep their moments and birth step. New ones start with zero
        moments, and their birth step is the number of steps done.

        Args:
            flat: flat shard, fp32, 1-D.
            live: mask of the entries to step, bool, of ``flat``'s length.
        """
        state = self._state(flat)
        for i, live_N in enumerate(live.to(flat.device).split(CHUNK)):
            old = state["chunks"][i]
            born_N = torch.where(old.live(), old.born(), state["step"])
            exp_avg_N, exp_avg_sq_N = (old.spread(getattr(old, key).read()) for key in MOMENTS)
            self._pack(state, i, live_N, exp_avg_N, exp_avg_sq_N, born_N)

    def restore(
        self,
        flat: Tensor,
        live: Tensor,
        exp_avg: Tensor,
        exp_avg_sq: Tensor,
        born: Tensor,
        steps: int,
    ) -> None:
        """Set the state of a flat shard to that of a checkpoint.

        Args:
            flat: flat shard, fp32, 1-D; the tensors below have its length.
            live: mask of live entries, bool.
            exp_avg: first moment, fp32, zero for dead entries.
            exp_avg_sq: second moment, fp32, zero for dead entries.
            born: birth steps, int32: number of steps done when an entry became live.
            steps: number of steps that were done at the checkpoint.
        """
        state = self._state(flat)
        state["step"] = steps
        parts = (t.to(flat.device).split(CHUNK) for t in (live, exp_avg, exp_avg_sq, born))
        for i, part in enumerate(zip(*parts, strict=True)):
            self._pack(state, i, *part)

    def reset_moments(self, flat: Tensor, which: Tensor) -> None:
        """Set moments of a flat shard to zero, and birth steps to the number of steps done.

        Which entries are live does not change.

        Args:
            flat: flat shard, fp32, 1-D.
            which: mask of the entries to reset, bool, of ``flat``'s length.
        """
        state = self._state(flat)
        for i, which_N in enumerate(which.to(flat.device).split(CHUNK)):
            old, kept_N = state["chunks"][i], ~which_N
            born_N = torch.where(kept_N, old.born(), state["step"])
            exp_avg_N, exp_avg_sq_N = (
                old.spread(getattr(old, key).read()) * kept_N for key in MOMENTS
            )
            self._pack(state, i, old.live(), exp_avg_N, exp_avg_sq_N, born_N)

    def zero_after_step(self, flat: Tensor, mask: Tensor) -> None:
        """Schedule entries to be set to zero at the end of the flat shard's next step.

        Args:
            flat: flat shard, fp32, 1-D.
            mask: entries to set to zero, live or dead, bool, of ``flat``'s length.
        """
        state = self._state(flat)
        state["zero"] = mask.to(flat.device) | state.get("zero", False)

    def live(self, flat: Tensor) -> Tensor:
        """Return the mask of live entries of a flat shard, bool, 1-D, one value for each entry."""
        return torch.cat([chunk.live() for chunk in self.state[flat]["chunks"]])

    def dense(self, flat: Tensor, key: str) -> Tensor:
        """Return one of Adam's moments of a flat shard.

        Args:
            flat: flat shard, fp32, 1-D.
            key: which moment: "exp_avg" or "exp_avg_sq".

        Returns:
            fp32, 1-D, one value for each entry of ``flat``, zero for dead entries.
        """
        chunks = self.state[flat]["chunks"]
        return torch.cat([chunk.spread(getattr(chunk, key).read()) for chunk in chunks])

    def born(self, flat: Tensor) -> Tensor:
        """Return the birth step of each entry of a flat shard: number of steps done when it became
        live. int32, 1-D, zero for dead entries."""
        return torch.cat([chunk.born() for chunk in self.state[flat]["chunks"]])

    def num_live(self) -> int:
        """Return the number of live entries on this rank."""
        return sum(chunk.count for state in self.state.values() for chunk in state["chunks"])

    def state_bytes(self) -> StateBytes:
        """Return the exact size in bytes of the state kept between steps, now and at its peaks."""
        return StateBytes(now=self._nbytes(), peak=self._peak, repacking=self._repacking)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # ZeRO-3 has no closures
        """Update the flat shards that the engine has put into ``param_groups``, in place.

        The engine calls it at the end of each optimizer step, on each rank.

        Args:
            closure: unused; an argument of any torch optimizer.
        """
        for group in self.param_groups:
            for flat in group["params"]:
                self._step_shard(flat, group)

    @torch.no_grad()
    def skip_step(self, flat: Tensor) -> None:
        """Count a step that the engine refused, because the loss or a gradient is not finite.

        The shard's step count, which birth steps are read from, stays equal to that of the run.
        Entries that ``zero_after_step`` has scheduled become zero; nothing else changes.

        Args:
            flat: flat shard, fp32, 1-D.
        """
        self._begin_step(flat)
        self._end_step(flat)

    def _step_shard(self, flat: Tensor, group: dict[str, Any]) -> None:
        state = self._begin_step(flat)
        assert flat.grad is not None, "the engine calls step with a gradient in place"
        parts = flat.data.split(CHUNK), flat.grad.split(CHUNK), state["chunks"]
        for w_N, grad_N, chunk in zip(*parts, strict=True):
            if chunk.count > 0:
                _step_chunk(w_N, grad_N, chunk, state["step"], group)
        self._end_step(flat)

    def _begin_step(self, flat: Tensor) -> dict[str, Any]:
        state: dict[str, Any] = self.state[flat]
        state["step"] += 1
        return state

    def _end_step(self, flat: Tensor) -> None:
        if (zero := self.state[flat].pop("zero", None)) is not None:
            flat.data.masked_fill_(zero, 0.0)

    def _state(self, flat: Tensor) -> dict[str, Any]:
        """Return the state of a flat shard. If it has none, create one without live entries."""
        state: dict[str, Any] = self.state[flat]
        if not state:
            state["step"], state["chunks"] = 0, []
            for part in flat.data.split(CHUNK):
                zero_N = torch.zeros_like(part)
                chunk = Packed(
                    zero_N.bool(), zero_N, zero_N, zero_N.int(), eight_bit=self.eight_bit
                )
                state["chunks"].append(chunk)
        return state

    def _pack(self, state: dict[str, Any], i: int, *dense: Tensor) -> None:
        new = Packed(*dense, eight_bit=self.eight_bit)
        spread = sum(t.nbytes for t in dense)
        self._repacking = max(self._repacking, self._nbytes() + spread + new.nbytes())
        state["chunks"][i] = new
        self._peak = max(self._peak, self._nbytes())

    def _nbytes(self) -> int:
        return sum(chunk.nbytes() for state in self.state.values() for chunk in state["chunks"])


def _step_chunk(
    w_N: Tensor, grad_N: Tensor, chunk: Packed, step: int, group: dict[str, Any]
) -> None:
    """Update the live entries of one chunk by AdamW and the method's projection, in place.

    Args:
        w_N: fp32 master values of all the chunk's entries, changed in place.
        grad_N: their gradient, fp32.
        chunk: optimizer state of the chunk, changed in place.
        step: number of the optimizer step, counted from 1.
        group: param group of the flat shard, with the hyperparameters.
    """
    where_L = chunk.where()
    w, grad = (w_N, grad_N) if where_L is None else (w_N[where_L], grad_N[where_L])
    update = _adamw(w, grad, chunk, step, group)
    if group["project"]:
        w = group["project"](w, update)
    if where_L is None:
        w_N.copy_(w)
    else:
        w_N[where_L] = w


def _adamw(w: Tensor, grad: Tensor, chunk: Packed, step: int, group: dict[str, Any]) -> Update:
    """Apply one step of AdamW to the live entries and the chunk's moments, in place.

    Lists whose names end in _K have one value for each distinct birth step: entries that became
    live at the same step share age, learning rate and bias correction.

    Args:
        w: fp32 master values of the chunk's live entries, 1-D, changed in place.
        grad: their gradient, fp32, 1-D.
        chunk: optimizer state of the chunk, changed in place.
        step: number of the optimizer step, counted from 1.
        group: param group of the flat shard, with the hyperparameters.

    Returns:
        The step, and learning rate and denominator of the entries, for the projection that follows.
    """
    rate, (beta1, beta2) = group["rate"], group["betas"]
    ages_K = [step - born for born in chunk.births]
    lr_K = [(rate(b) if rate else group["lr"]) * group["lr_factor"] for b in chunk.births]
    size_K = [lr / (1 - beta1**age) for lr, age in zip(lr_K, ages_K, strict=True)]
    lr, size = chunk.per_entry(lr_K), chunk.per_entry(size_K)
    decay = chunk.per_entry([1 - lr * group["weight_decay"] for lr in lr_K])
    correction = chunk.per_entry([(1 - beta2**age) ** 0.5 for age in ages_K])
    exp_avg, exp_avg_sq = chunk.exp_avg.read(), chunk.exp_avg_sq.read()

    w.mul_(decay)
    exp_avg.lerp_(grad, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    denominator = (exp_avg_sq.sqrt() / correction).add_(group["eps"])
    if isinstance(size, Tensor):
        w.addcdiv_(exp_avg * -size, denominator)
    else:
        w.addcdiv_(exp_avg, denominator, value=-size)
    chunk.exp_avg.write(exp_avg)
    chunk.exp_avg_sq.write(exp_avg_sq)
    return Update(step=step, lr=lr, denominator=denominator)
