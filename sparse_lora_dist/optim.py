"""SparseAdamW: AdamW over ZeRO-3's flat fp32 shards, with moments for live entries only.

DeepSpeed hands ``step`` one flat shard at a time, several adapters one after another, rows cut
anywhere. So all that happens here is elementwise: gather the live entries, step them, project them,
write them back; what is not live is exactly zero afterwards. Done inside ``step``, the
low-precision copy that DeepSpeed makes right after it is never stale.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

Project = Callable[[Tensor, float], Tensor]

MOMENTS = ("exp_avg", "exp_avg_sq")
"""Keys of the packed state, one value per live entry each."""

CHUNK = 2**24
"""Entries stepped at a time: picking live ones out takes 20 bytes of scratch for each."""


class SparseAdamW(torch.optim.Optimizer):
    """Loshchilov & Hutter 2019, arXiv:1711.05101, with the same arithmetic as torch.optim.AdamW:

        w <- (1 - lr * weight_decay) w
        m <- lerp(m, g, 1 - beta1)            v <- beta2 v + (1 - beta2) g^2
        w <- w - lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)
        w <- project(w, lr)

    t counts steps of each flat shard. State of a shard: ``live`` (bool, whole shard), ``step``, and
    the packed ``exp_avg`` and ``exp_avg_sq``, one fp32 each per live entry.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        *,
        lr: float,
        weight_decay: float,
        project: Project,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        super().__init__(
            params, {"lr": lr, "weight_decay": weight_decay, "betas": betas, "eps": eps}
        )
        self.project = project

    def set_live(self, flat: Tensor, live: Tensor) -> None:
        """Only these entries of a shard exist from now on; survivors keep their moments."""
        state = self.state[flat]
        for key in MOMENTS:
            dense = self.dense(flat, key) if key in state else torch.zeros_like(flat)
            state[key] = dense[live]
        state.setdefault("step", 0)
        state["live"] = live

    def dense(self, flat: Tensor, key: str) -> Tensor:
        """A packed moment spread out over its shard, zero where nothing lives."""
        state = self.state[flat]
        out = torch.zeros_like(flat.data)
        out[state["live"]] = state[key]
        return out

    def state_bytes(self) -> int:
        """Bytes of moments on this rank."""
        return sum(s[k].nbytes for s in self.state.values() for k in MOMENTS)

    def num_live(self) -> int:
        """Live entries on this rank."""
        return sum(s["exp_avg"].numel() for s in self.state.values())

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # ZeRO-3 has no closures
        """One AdamW step of whatever shards the engine has put into ``param_groups``."""
        for group in self.param_groups:
            for flat in group["params"]:
                self._step_shard(flat, group)

    def _step_shard(self, flat: Tensor, group: dict[str, Any]) -> None:
        state, done = self.state[flat], 0
        state["step"] += 1
        assert flat.grad is not None, "the engine calls step with a gradient in place"
        parts = (t.split(CHUNK) for t in (flat.data, flat.grad, state["live"]))
        for whole, grad, live in zip(*parts, strict=True):
            count = int(live.sum())
            exp_avg, exp_avg_sq = (state[key][done : done + count] for key in MOMENTS)
            done += count
            all_live = count == live.numel()
            w = whole if all_live else whole[live]
            adamw_(w, grad if all_live else grad[live], exp_avg, exp_avg_sq, state["step"], group)
            w = self.project(w, group["lr"])
            if all_live:
                whole.copy_(w)
            else:
                whole.zero_()[live] = w


def adamw_(
    w: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: int, group: dict[str, Any]
) -> None:
    """One AdamW step of ``w`` and its moments, in place, in the order of torch.optim.AdamW."""
    lr, (beta1, beta2) = group["lr"], group["betas"]
    w.mul_(1 - lr * group["weight_decay"])
    exp_avg.lerp_(grad, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    denominator = (exp_avg_sq.sqrt() / (1 - beta2**step) ** 0.5).add_(group["eps"])
    w.addcdiv_(exp_avg, denominator, value=-lr / (1 - beta1**step))
