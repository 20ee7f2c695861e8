"""SparseAdamW: AdamW over ZeRO-3's flat fp32 shards, paying for live entries only.

DeepSpeed hands ``step`` one flat shard at a time, several adapters one after another, rows cut
anywhere. So all that happens here is elementwise: gather the live entries, step them, project them,
write them back; what is not live holds its value. Done inside ``step``, the low-precision copy that
DeepSpeed makes right after it is never stale.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparse_lora_dist.methods.protocol.form import Update
from sparse_lora_dist.optim.moments import MOMENTS, Packed

CHUNK = 2**18
"""Entries stepped and re-packed at a time, since both take scratch for each; a multiple of 8."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StateBytes:
    """Bytes of moments, live bits and births on this rank, as their storages have them."""

    now: int
    peak: int
    """The most so far, between re-packings."""
    repacking: int
    """The most so far while a chunk was re-packed: its old state, its new one, and its moments and
    births spread out between the two."""


class SparseAdamW(torch.optim.Optimizer):
    """Loshchilov & Hutter 2019, arXiv:1711.05101, with the same arithmetic as torch.optim.AdamW:

        w <- (1 - lr * weight_decay) w
        m <- lerp(m, g, 1 - beta1)            v <- beta2 v + (1 - beta2) g^2
        denominator = sqrt(v) / sqrt(1 - beta2^age) + eps
        w <- w - lr / (1 - beta1^age) * m / denominator
        w <- project(w, Update(step, lr, denominator))

    ``age`` counts the steps of an entry since it came to life, not those of the run: its moments
    start at zero, and with a bias corrected for the run's age its first updates would be 2.5 to 4
    times too large.

    Keys of a param group, besides Adam's: ``rate`` (born -> learning rate now of entries that came
    to life after so many steps; None: ``lr`` for all), ``lr_factor`` (multiplies either) and
    ``project`` (None, or a ``Project``). State of a shard: ``step``, how many it has done, and
    ``chunks``, one ``Packed`` each.
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
        """Only these entries of a shard are stepped from now on. Survivors keep moments and birth;
        the others start at zero, born now."""
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
        """Put back what ``live``, ``dense`` and ``born`` gave, after ``steps`` steps."""
        state = self._state(flat)
        state["step"] = steps
        parts = (t.to(flat.device).split(CHUNK) for t in (live, exp_avg, exp_avg_sq, born))
        for i, part in enumerate(zip(*parts, strict=True)):
            self._pack(state, i, *part)

    def reset_moments(self) -> None:
        """Every live entry starts anew: moments zero, born now."""
        for state in self.state.values():
            for i, old in enumerate(state["chunks"]):
                live_N = old.live()
                zero_N = torch.zeros_like(live_N, dtype=torch.float32)
                now_N = torch.full_like(live_N, state["step"], dtype=torch.int32)
                self._pack(state, i, live_N, zero_N, zero_N, now_N)

    def zero_after_step(self, flat: Tensor, mask: Tensor) -> None:
        """These entries, live or not, are exactly zero at the end of the shard's next step."""
        state = self._state(flat)
        state["zero"] = mask.to(flat.device) | state.get("zero", False)

    def live(self, flat: Tensor) -> Tensor:
        """Which entries of a shard live, bool."""
        return torch.cat([chunk.live() for chunk in self.state[flat]["chunks"]])

    def dense(self, flat: Tensor, key: str) -> Tensor:
        """A moment spread out over its shard, fp32, zero where nothing lives."""
        chunks = self.state[flat]["chunks"]
        return torch.cat([chunk.spread(getattr(chunk, key).read()) for chunk in chunks])

    def born(self, flat: Tensor) -> Tensor:
        """The steps after which entries came to life, int32, zero where nothing lives."""
        return torch.cat([chunk.born() for chunk in self.state[flat]["chunks"]])

    def num_live(self) -> int:
        """Live entries on this rank."""
        return sum(chunk.count for state in self.state.values() for chunk in state["chunks"])

    def state_bytes(self) -> StateBytes:
        """Exact: all that is kept from one step to the next."""
        return StateBytes(now=self._nbytes(), peak=self._peak, repacking=self._repacking)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # ZeRO-3 has no closures
        """One AdamW step of whatever shards the engine has put into ``param_groups``."""
        for group in self.param_groups:
            for flat in group["params"]:
                self._step_shard(flat, group)

    @torch.no_grad()
    def skip_step(self, flat: Tensor) -> None:
        """What is left of a shard's step that the engine refused: it counts, so that ages and
        births stay steps of the run, and what was to be zero after it is."""
        self._begin_step(flat)
        self._end_step(flat)

    def _step_shard(self, flat: Tensor, group: dict[str, Any]) -> None:
        state = self._begin_step(flat)
        assert flat.grad is not None, "the engine calls step with a gradient in place"
        parts = flat.data.split(CHUNK), flat.grad.split(CHUNK), state["chunks"]
        for whole_N, grad_N, chunk in zip(*parts, strict=True):
            if chunk.count > 0:
                _step_chunk(whole_N, grad_N, chunk, state["step"], group)
        self._end_step(flat)

    def _begin_step(self, flat: Tensor) -> dict[str, Any]:
        state: dict[str, Any] = self.state[flat]
        state["step"] += 1
        return state

    def _end_step(self, flat: Tensor) -> None:
        if (zero := self.state[flat].pop("zero", None)) is not None:
            flat.data.masked_fill_(zero, 0.0)

    def _state(self, flat: Tensor) -> dict[str, Any]:
        """A shard's state; at first nothing lives in it."""
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
    whole_N: Tensor, grad_N: Tensor, chunk: Packed, step: int, group: dict[str, Any]
) -> None:
    where = chunk.where()
    w, grad = (whole_N, grad_N) if where is None else (whole_N[where], grad_N[where])
    update = _adamw(w, grad, chunk, step, group)
    if group["project"]:
        w = group["project"](w, update)
    if where is None:
        whole_N.copy_(w)
    else:
        whole_N[where] = w


def _adamw(w: Tensor, grad: Tensor, chunk: Packed, step: int, group: dict[str, Any]) -> Update:
    """Step ``w`` in place, and the chunk's moments, in the order of torch.optim.AdamW."""
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
