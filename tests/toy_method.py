"""A method as somebody would add it: entries die at each second step, least sensitive first."""

from dataclasses import dataclass
from math import prod

from torch import Tensor

from sparse_lora_dist.methods.protocol.method import (
    By,
    Decision,
    Method,
    MethodFactory,
    Plan,
    Scores,
    Stats,
)


@dataclass(frozen=True, kw_only=True)
class ToyOptions:
    """Options of the toy method."""

    toy_keep: float = 0.5
    """Fraction of entries that live in the end."""

    def __post_init__(self) -> None:
        if not 0.0 < self.toy_keep <= 1.0:
            raise ValueError(f"toy_keep must be in (0, 1], got {self.toy_keep}")


def smooth_sensitivity(stats: Stats, w: Tensor, grad: Tensor, step: int) -> Stats:
    """0.9 s + 0.1 |w g|"""
    return (stats[0] * 0.9 + (w * grad).abs() * 0.1,)


def toy(options: ToyOptions, plan: Plan) -> Method:
    """Prunes linearly to ``toy_keep`` over the run."""

    def decide(step: int, scores: Scores) -> Decision:
        keep = 1.0 - (1.0 - options.toy_keep) * min(step / plan.total_steps, 1.0)
        k = {name: round(keep * prod(shape)) for name, shape in scores.shapes.items()}
        by: dict[str, By] = dict.fromkeys(k, "tensor")
        return Decision(live=scores.top_k(k, by), facts={"keep": keep})

    return Method(
        name="toy",
        n_stats=1,
        observe=smooth_sensitivity,
        decides_at=lambda step: step > 0 and step % 2 == 0,
        decide=decide,
    )


TOY = MethodFactory(options=ToyOptions, build=toy, summary="half of the entries, most sensitive")
