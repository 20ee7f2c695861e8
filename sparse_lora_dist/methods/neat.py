"""NEAT (PEANuT): make the update a small network of the base weight itself.

    y = (W + (alpha / R) f(W)) x
    official    f(W) = h B,  h = relu(W A^T)            A and B: R x I
    peft        f(W) = B h,  h = relu(A W)              A: R x O, B: O x R

W is the base weight; forward dequantises it while ZeRO-3 has it gathered. A and B are trained, and
B starts at zero. `neat_depth` D adds R x R layers. Form official adds D of them, h = relu(h M^T).
Form peft adds D encoders and D decoders with residual sums, as PEFT's `peanut` has them.

Nothing is decided.

This implementation differs from the authors' code and from PEFT's:

- f(W) is kept as a product of two thin matrices, one of them h, and the O x I product is never
  computed.
- The adapter is exported as a LoRA pair, with h computed from the base that it was trained on.
  Another base, or the same one rounded in another way, would give another h. So use the LoRA pair
  for serving, and the `peanut` export to go on training.

In short:

- **Optimizer state:** 8 bytes x trained entries, 2 R I + D R^2 (official) or 2 R O + 2 D R^2 (peft)
  a linear.
- **Statistics:** none.
- **Exports as:** PEFT LoRA, PEFT PEANuT (form peft), merged model or sparse delta.
- **Choose it when:** you want to try a nonlinear update; each forward reads the base weight twice.
- **Paper:** Zhong et al. 2024, arXiv:2410.01870.

Shapes: T tokens, I in_features, O out_features, R rank, D depth.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sparse_lora_dist.methods.protocol.form import (
    WEIGHT,
    Form,
    PeftForm,
    Site,
    Tensors,
    TensorSpec,
    kaiming_uniform,
    zeros,
)
from sparse_lora_dist.methods.protocol.method import Method, MethodFactory, RunContext


@dataclass(frozen=True, kw_only=True)
class NeatOptions:
    """NEAT: a small network of the base weight"""

    neat_form: Literal["official", "peft"] = "official"
    """Side of the weight that the network reads: official (the input side) or peft (the output
    side, as in PEFT's PEANuT; PEFT can train the exported adapter further)."""
    neat_depth: int = 0
    """Number of additional layers of size --rank x --rank, at least 0; form peft adds this many
    encoders and this many decoders."""

    def __post_init__(self) -> None:
        if self.neat_depth < 0:
            raise ValueError(f"--neat_depth must be at least 0, got {self.neat_depth}")


def neat(options: NeatOptions, context: RunContext) -> Method:
    """Return the `Method` that describes NEAT to training, planning and export.

    Args:
        options: Values of the --neat options.
        context: Unused.
    """
    form = official if options.neat_form == "official" else as_peft
    return Method(name="neat", form=lambda site: form(site, options.neat_depth))


def official(site: Site, depth: int) -> Form:
    """Return the form of a site as in the authors' code: f(W) = h B with h = relu(W A^T).

    As a LoRA pair, the trained B is the pair's A, and h is the pair's B.

    Args:
        site: The linear that is adapted.
        depth: Number of additional R x R layers.
    """
    inner = [f"neat_m{k}" for k in range(depth)]

    def pair(tensors: Tensors) -> tuple[Tensor, Tensor]:
        h_OR = torch.relu(tensors[WEIGHT] @ tensors["neat_a"].t())
        for name in inner:
            h_OR = torch.relu(h_OR @ tensors[name].t())
        return tensors["neat_b"], h_OR

    shapes = site.rank, site.in_features
    return network(site, inner, a_shape=shapes, b_shape=shapes, pair=pair)


def as_peft(site: Site, depth: int) -> Form:
    """Return the form of a site as in PEFT's PEANuT: f(W) = B h with h = relu(A W).

    As a LoRA pair, h is the pair's A, and the trained B is the pair's B.

    Args:
        site: The linear that is adapted.
        depth: Number of additional encoders, and of additional decoders.
    """
    encoders, decoders = ([f"neat_{k}{i}" for i in range(depth)] for k in ("encoder", "decoder"))

    def pair(tensors: Tensors) -> tuple[Tensor, Tensor]:
        h_IR, before = torch.relu(tensors[WEIGHT].t() @ tensors["neat_a"].t()), []
        for name in encoders:
            before.append(h_IR)
            h_IR = torch.relu(h_IR @ tensors[name].t())
        for name in decoders:
            h_IR = torch.relu(h_IR @ tensors[name].t()) + before.pop()
        return h_IR.t(), tensors["neat_b"]

    def to_peft(tensors: Tensors, scale: float) -> PeftForm:
        named = {f"peanut_{k.upper()}.weight": tensors[f"neat_{k}"] for k in "ab"}
        for kind, names in (("encoders", encoders), ("decoders", decoders)):
            named |= {f"peanut_{kind}.{i}.weight": tensors[n] for i, n in enumerate(names)}
        config = {"r": site.rank, "depth": depth, "scaling": scale, "act_fn": "relu"}
        return PeftForm(kind="PEANUT", tensors=named, config=config)

    a_shape, b_shape = (site.rank, site.out_features), (site.out_features, site.rank)
    inner = [*encoders, *decoders]
    return network(site, inner, a_shape=a_shape, b_shape=b_shape, pair=pair, to_peft=to_peft)


def network(
    site: Site,
    inner: Sequence[str],
    *,
    a_shape: tuple[int, int],
    b_shape: tuple[int, int],
    pair: Callable[[Tensors], tuple[Tensor, Tensor]],
    to_peft: Callable[[Tensors, float], PeftForm] | None = None,
) -> Form:
    """Return the form of a site whose LoRA pair is computed from the base weight.

    Args:
        site: The linear that is adapted.
        inner: Names of the trained R x R layers.
        a_shape: Shape of the trained tensor ``neat_a``.
        b_shape: Shape of the trained tensor ``neat_b``.
        pair: Function (tensors) -> (a_RI, b_OR), the LoRA pair.
        to_peft: Function (tensors, scale) -> the site's tensors and config for PEFT's own type of
            this adapter. None: PEFT has no such type.
    """

    def delta(x_TI: Tensor, tensors: Tensors, scale: float) -> Tensor:
        a_RI, b_OR = pair(tensors)
        return (x_TI @ a_RI.t() * scale) @ b_OR.t()

    return Form(
        tensors={
            "neat_a": TensorSpec(shape=a_shape, init=kaiming_uniform),
            "neat_b": TensorSpec(shape=b_shape, init=zeros),
            **{n: TensorSpec(shape=(site.rank, site.rank), init=kaiming_uniform) for n in inner},
        },
        reads_base=True,
        delta=delta,
        to_lora=pair,
        to_peft=to_peft,
    )


NEAT = MethodFactory(
    options=NeatOptions,
    build=neat,
    summary="trains a small network of the base weight",
    example="--neat_form peft --neat_depth 1",
)
