"""LoRTA: make the updates of all linears one tensor of low CP rank, whose factors they share.

    dW[(h, e), i] = (alpha / R) sum_r In[i, r] E[e, r] H[h, r] L[l, r] M[m, r]

is the update of matrix m in layer l. Its outputs are divided into heads h of O / H outputs e each,
and i is an input. For one linear it equals a LoRA of rank R with A = In^T.

Nothing is decided. All linears must have one shape (choose them with `--target_modules`). The layer
is the first whole number in a linear's name (0 if there is none), and the matrix is the rest of the
name, so that no two linears share an update.

This implementation may differ from the paper, whose code was not available and whose initial
values are not known:

- In starts from N(0, 1 / I), E, H and L from N(0, 1), and M at zero. So all updates start at zero,
  as LoRA's do.
- The outputs of every linear are divided into heads. This includes output projections, where it is
  the inputs that belong to attention heads. So all matrices are treated alike and need not be
  square.
- The gradient of a factor is summed over all linears in the engine's precision. In bf16 a sum over
  128 linears is off by about 1%.

In short:

- **Optimizer state:** 8 bytes x trained entries, `--rank` x (inputs + outputs of a head + heads +
  layers + matrices) for the whole model.
- **Statistics:** none.
- **Exports as:** PEFT LoRA of rank R, merged model or sparse delta.
- **Choose it when:** what trains must be tiny, and linears of one shape are enough.
- **Paper:** Hounie et al. 2024, arXiv:2410.04060.

Shapes: T tokens, I in_features, O out_features, H heads, E outputs of a head, L layers, M matrices,
R CP rank.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from sparse_lora_dist.methods.protocol.form import (
    Form,
    Site,
    Tensors,
    TensorSpec,
    low_rank_delta,
    zeros,
)
from sparse_lora_dist.methods.protocol.method import Method, MethodFactory, RunContext


@dataclass(frozen=True, kw_only=True)
class LortaOptions:
    """LoRTA: one low-rank tensor for all linears"""

    lorta_heads: int | None = None
    """Number of heads that the outputs of every linear are split into, at least 1; must divide
    out_features. null: out_features / 128 (/ 64 below 4096 outputs), or the nearest divisor."""

    def __post_init__(self) -> None:
        if self.lorta_heads is not None and self.lorta_heads < 1:
            raise ValueError(f"--lorta_heads must be at least 1, got {self.lorta_heads}")


def lorta(options: LortaOptions, context: RunContext) -> Method:
    """Return the `Method` that describes LoRTA to training, planning and export.

    Args:
        options: Value of --lorta_heads.
        context: Adapted linears of the run.

    Raises:
        ValueError: The linears differ in shape, or --lorta_heads does not divide their outputs.
    """
    check_shapes(context.sites)
    check_heads(context.sites[0], options.lorta_heads)
    places = dict(
        zip((site.name for site in context.sites), map(place, context.sites), strict=True)
    )
    layers = sorted({layer for layer, _ in places.values()})
    matrices = list(dict.fromkeys(matrix for _, matrix in places.values()))

    def form(site: Site) -> Form:
        # The planner also asks for linears that are not in the run, for their sizes alone.
        layer, matrix = places.get(site.name, (layers[0], matrices[0]))
        l, m = layers.index(layer), matrices.index(matrix)  # noqa: E741
        heads = heads_of(site.out_features, options.lorta_heads)

        def to_lora(tensors: Tensors) -> tuple[Tensor, Tensor]:
            of_site_R = tensors["lorta_l"][l] * tensors["lorta_m"][m]
            b_HER = tensors["lorta_h"][:, None] * tensors["lorta_e"] * of_site_R
            return tensors["lorta_in"].t(), b_HER.flatten(0, 1)

        def delta(x_TI: Tensor, tensors: Tensors, scale: float) -> Tensor:
            a_RI, b_OR = to_lora(tensors)
            return low_rank_delta(x_TI, {"lora_a": a_RI, "lora_b": b_OR}, scale)

        def factor(size: int, init: Callable[[Tensor, torch.Generator], None]) -> TensorSpec:
            return TensorSpec(shape=(size, site.rank), init=init, shared=True)

        tensors = {
            "lorta_in": factor(site.in_features, of_unit_columns),
            "lorta_e": factor(site.out_features // heads, normal),
            "lorta_h": factor(heads, normal),
            "lorta_l": factor(len(layers), normal),
            "lorta_m": factor(len(matrices), zeros),
        }
        return Form(tensors=tensors, delta=delta, to_lora=to_lora)

    return Method(name="lorta", form=form)


def normal(t: Tensor, generator: torch.Generator) -> None:
    t.normal_(generator=generator)


def of_unit_columns(t_IR: Tensor, generator: torch.Generator) -> None:
    """Fill ``t_IR`` in place from N(0, 1 / I), so that its columns have a length of about 1.

    Args:
        t_IR: Tensor to fill, [I in_features, R rank].
        generator: Source of the random values.
    """
    t_IR.normal_(std=len(t_IR) ** -0.5, generator=generator)


def place(site: Site) -> tuple[int, str]:
    """Split the name of a linear into its layer and its matrix.

    The layer is the first whole number in the name (0 if there is none); the matrix is the rest of
    it. "model.layers.3.self_attn.q_proj" gives (3, "model.layers.self_attn.q_proj").

    Returns:
        (layer, matrix).
    """
    parts = site.name.split(".")
    for i, part in enumerate(parts):
        if part.isdecimal():
            return int(part), ".".join(parts[:i] + parts[i + 1 :])
    return 0, site.name


def nearest_divisors(number: int, wanted: float) -> list[int]:
    """Return all divisors of ``number``, those nearest to ``wanted`` first."""
    divisors = [n for n in range(1, number + 1) if number % n == 0]
    return sorted(divisors, key=lambda n: (abs(n - wanted), n))


@cache
def heads_of(num_outputs: int, wanted: int | None) -> int:
    """Return the number of heads that the outputs of a linear are divided into.

    It is the divisor of ``num_outputs`` that is nearest to ``wanted``. If ``wanted`` is None, it is
    the one nearest to num_outputs / 128, or / 64 below 4096 outputs.

    Args:
        num_outputs: out_features of the linear.
        wanted: Value of --lorta_heads.
    """
    usual = num_outputs / (128 if num_outputs >= 4096 else 64)
    return nearest_divisors(num_outputs, wanted or usual)[0]


def check_heads(site: Site, wanted: int | None) -> None:
    """Raise ValueError if ``wanted`` heads do not divide the outputs of ``site``.

    Args:
        site: One of the adapted linears, which all have the same shape.
        wanted: Value of --lorta_heads. None passes.
    """
    if wanted is not None and site.out_features % wanted:
        near = sorted(nearest_divisors(site.out_features, wanted)[:2])
        raise ValueError(
            f"--lorta_heads {wanted} does not divide the {site.out_features} outputs of {site.name}"
            f". The nearest numbers that do are {' and '.join(map(str, near))}"
        )


def check_shapes(sites: Sequence[Site]) -> None:
    """Raise ValueError if the linears do not all have one shape.

    The message gives the --target_modules of the largest group of linears that have one shape.
    """
    groups = defaultdict(list)
    for site in sites:
        groups[site.out_features, site.in_features].append(site)
    if len(groups) == 1:
        return
    got = [f"{o} x {i} ({group[0].name})" for (o, i), group in groups.items()]
    most = max(groups.values(), key=len)
    others = [site.name for group in groups.values() if group is not most for site in group]
    names = dict.fromkeys(own_ending(site.name, others) for site in most)
    raise ValueError(
        f"all linears must have one shape, got {', '.join(got)}. To adapt the largest group of one "
        f"shape, give --target_modules {','.join(names)}"
    )


def own_ending(name: str, others: Sequence[str]) -> str:
    """Return the shortest dotted suffix of ``name`` that no name in ``others`` ends with.

    For "layers.0.q_proj" and others ("layers.0.k_proj",) that is "q_proj".

    Args:
        name: Module name of a linear.
        others: Module names of the linears that the suffix must not match.
    """
    parts = name.split(".")
    ends = [".".join(parts[i:]) for i in reversed(range(len(parts)))]
    own = (e for e in ends if not any(f".{other}".endswith(f".{e}") for other in others))
    return next(own, name)


LORTA = MethodFactory(
    options=LortaOptions,
    build=lorta,
    summary="trains one low-rank tensor whose factors all linears share",
    example="--target_modules q_proj,o_proj",
)
