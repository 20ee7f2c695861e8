"""PRILoRA: let ranks rise with depth, and zero the least important entries of A again and again.

    y = W x + (alpha / --rank) B_l A_l x            rank of layer l is linear in its depth
    importance of a_ri = |a_ri| sqrt(mean x_i^2)

a_ri is the entry in row r and column i of A, and x_i feature i of the linear's input. Ranks go from
`prilora_first` at the bottom to 2 x `--rank` - `prilora_first` at the top, so that their mean is
`--rank`. The scale is the same in all layers.

The method decides every `prilora_every` steps after `prilora_start`: the least important
`prilora_sparsity` of each row of A is zeroed. The mean of x_i^2 is a running mean over the tokens
of all rows (sequences) and ranks, of the linear's input before dropout; where it is unknown, |a_ri|
alone counts. A zeroed entry keeps its moments and its gradient and moves again at the next step, so
A is sparse at the end only if the last step prunes.

This implementation may differ from the paper, whose code could not be read. These points are not
confirmed:

- The defaults: ranks 4 to 12, a pruning every 40 steps, and half of A zeroed.
- Importance is compared within a row of A.
- Zeroed entries may return.
- The running mean has a decay rate.
- The scale is the same in all layers.

The layer of a linear is the first whole number in its name ("model.layers.3.self_attn.q_proj"), or
the linear itself if there is none; layers are ordered as in the model.

- **Optimizer state:** 8 bytes x trained entries, as many as LoRA of the same `--rank` where layers
  have equal shapes.
- **Statistics:** 8 bytes x input features of each linear.
- **Exports as:** PEFT LoRA of each layer's rank, merged model or sparse delta.
- **Choose it when:** later layers probably need more, or you want a sparse A for the cost of LoRA.
- **Paper:** Benedek and Wolf 2024, arXiv:2401.11316.

Shapes: I in_features, R rank of the site, L layers.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sparse_lora_dist.methods.protocol.form import Form, Site, TensorSpec, kaiming_uniform, zeros
from sparse_lora_dist.methods.protocol.method import Method, MethodFactory, RunContext
from sparse_lora_dist.methods.protocol.rewriting import Rewriting, Rewritten, Whole, share_of
from sparse_lora_dist.methods.shared.top_k import k_largest

EVERY = 40
"""Default number of steps between two prunings, in a run with room for at least four."""


@dataclass(frozen=True, kw_only=True)
class PriLoraOptions:
    """PRILoRA: ranks rise with depth, A is pruned"""

    prilora_first: int | None = None
    """Rank of the bottom layer, at least 1; --rank is the mean, and the top layer has rank 2 x
    --rank - prilora_first. null: half of --rank, or the nearest rank that fits the linears."""
    prilora_sparsity: float = 0.5
    """Fraction of each row of A that a pruning sets to zero, in [0, 1); 0 turns pruning off."""
    prilora_every: int | None = None
    """Steps between two prunings, at least 1. null: 40, or a quarter of the steps after
    prilora_start if that is less."""
    prilora_start: int = 0
    """Steps before the first pruning interval, at least 0; the first pruning is at step
    prilora_start + prilora_every."""
    prilora_decay: float = 0.9
    """Decay rate of the running mean of squared inputs, in [0, 1)."""

    def __post_init__(self) -> None:
        problems = []
        for name in ("prilora_first", "prilora_every"):
            if (value := getattr(self, name)) is not None and value < 1:
                problems.append(f"--{name} must be at least 1, got {value}")
        if self.prilora_start < 0:
            problems.append(f"--prilora_start must be at least 0, got {self.prilora_start}")
        for name in ("prilora_sparsity", "prilora_decay"):
            if not 0.0 <= (share := getattr(self, name)) < 1.0:
                problems.append(f"--{name} must be in [0, 1), got {share}")
        if problems:
            raise ValueError("; ".join(problems))


def prilora(options: PriLoraOptions, context: RunContext) -> Method:
    """Return the `Method` that describes PRILoRA to training, planning and export.

    Args:
        options: Values of the --prilora options.
        context: Length and adapted linears of the run.

    Raises:
        ValueError: The linears cannot have the ranks that the options ask for, or the run ends
            before the first pruning.
    """
    ranks = ranks_of_layers(context.sites, options.prilora_first)

    def form(site: Site) -> Form:
        # The memory planner also asks for sites that are not in the context.
        rank = ranks.get(layer_of(site), site.rank)
        a_shape, b_shape = (rank, site.in_features), (site.out_features, rank)
        return Form(
            tensors={
                "lora_a": TensorSpec(shape=a_shape, init=kaiming_uniform),
                "lora_b": TensorSpec(shape=b_shape, init=zeros),
            },
            own_rank=rank,
        )

    return Method(name="prilora", form=form, rewriting=pruning(options, context.total_steps))


def layer_of(site: Site) -> str:
    """Return the name of the layer that a site belongs to: the first whole number in the site's
    name, or the whole name if there is none."""
    return next((part for part in site.name.split(".") if part.isdecimal()), site.name)


def ranks_of_layers(sites: Sequence[Site], first: int | None) -> dict[str, int]:
    """Compute the rank of each layer; ranks rise evenly with depth and have mean --rank.

    Args:
        sites: Linears that carry an adapter, in the model's order.
        first: Rank of the bottom layer. None: half of --rank, or the nearest rank that fits.

    Returns:
        {layer: rank of its sites}, where a layer is named as by ``layer_of``.

    Raises:
        ValueError: With ``first``, the mean is not --rank, or a rank is below 1 or above the
            smallest side of a layer's linears.
    """
    sides: dict[str, int] = {}
    for site in sites:
        side = min(site.in_features, site.out_features)
        sides[layer_of(site)] = min(side, sides.get(layer_of(site), side))
    mean = sites[0].rank

    def fits(start: int) -> bool:
        ranks = ramp(start, mean, len(sides))
        within = all(1 <= r <= side for r, side in zip(ranks, sides.values(), strict=True))
        return within and sum(ranks) == mean * len(sides)

    wanted = max(1, mean // 2) if first is None else first
    fitting = [start for start in range(1, 2 * mean) if fits(start)]
    nearest = min(fitting, key=lambda start: abs(start - wanted), default=mean)
    if first not in (None, nearest):
        raise ValueError(
            f"--prilora_first is {first}. With --rank {mean} as the mean, the top layer would have "
            f"rank {2 * mean - wanted}, but ranks must be from 1 to the shortest side of a layer's "
            "linears, and equal to --rank if the model has one layer. The nearest --prilora_first "
            f"that works is {nearest}"
        )
    return dict(zip(sides, ramp(nearest, mean, len(sides)), strict=True))


def ramp(first: int, mean: int, layers: int) -> list[int]:
    """Return the rank of each layer: whole numbers near a line from ``first`` to 2 * mean - first.

    Numbers with the largest fractions are rounded up and the others down, so that the mean is
    ``mean``. From 4 with mean 8 over 4 layers, the line 4, 6.67, 9.33, 12 becomes 4, 7, 9, 12.

    Args:
        first: Rank of the bottom layer.
        mean: Mean of the ranks.
        layers: Number of layers.
    """
    steps = max(1, layers - 1)
    parts = [divmod(first * steps + 2 * (mean - first) * i, steps) for i in range(layers)]
    missing = sum(left for _, left in parts) // steps
    order = sorted(range(layers), key=lambda i: parts[i][1], reverse=True)
    return [whole + (i in order[:missing]) for i, (whole, _) in enumerate(parts)]


def pruning(options: PriLoraOptions, total_steps: int) -> Rewriting | None:
    """Return the rewriting that prunes A at some steps, or None if --prilora_sparsity is 0.

    Args:
        options: Values of the --prilora options.
        total_steps: Optimizer steps of the run.

    Raises:
        ValueError: The run ends before the first pruning.
    """
    sparsity, start = options.prilora_sparsity, options.prilora_start
    if sparsity == 0.0:
        return None
    every = options.prilora_every or max(1, min(EVERY, (total_steps - start) // 4))
    if start + every > total_steps:
        raise ValueError(
            f"--prilora_start {start} and --prilora_every {every} put the first pruning at step "
            f"{start + every}, but the run has {total_steps}. Take at most {total_steps} for their "
            "sum, or --prilora_sparsity 0"
        )
    return Rewriting(
        at=lambda step: step > start and (step - start) % every == 0,
        write=lambda whole: pruned(whole, sparsity),
        reads_weight=False,
        squares_decay=options.prilora_decay,
    )


def pruned(whole: Whole, sparsity: float) -> Rewritten:
    """Return A with its least important entries set to zero.

    Importance is |a| * sqrt(mean squared input feature), or |a| if no inputs were collected. The
    fraction of zeros in A is logged as ``zeros_in_a``.

    Args:
        whole: A site with its tensors and statistics.
        sparsity: Fraction of each row that is set to zero; the number of entries is rounded down.
    """
    a_RI, squares_I = whole.tensors["lora_a"], whole.squares_I
    importance_RI = a_RI.abs().double()
    if squares_I is not None:
        importance_RI = importance_RI * squares_I.sqrt()
    keep = a_RI.shape[1] - int(sparsity * a_RI.shape[1])
    kept_RI = torch.stack([k_largest(importance_I, keep) for importance_I in importance_RI])
    a_RI = torch.where(kept_RI, a_RI, 0.0)
    return Rewritten(tensors={"lora_a": a_RI}, log_values={"zeros_in_a": share_of(a_RI == 0.0)})


PRILORA = MethodFactory(
    options=PriLoraOptions,
    build=prilora,
    summary="raises ranks with depth, and prunes A again and again",
    example="--prilora_every 3",
)
