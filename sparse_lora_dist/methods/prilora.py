"""PRILoRA: ranks that grow with depth, and an A of which the less important half is zeroed.

Benedek and Wolf 2024, arXiv:2401.11316. W + (alpha / R) B A with A r x I and B O x r, where r grows
linearly from the first layer to the last and is R, ``--rank``, in the mean: layers of equal shapes
train as many entries as LoRA of rank R. Every so many steps the entries of least importance

    |a_ri| * sqrt(mean of x_i^2)

in each row of A become zero. They go on to receive gradient, their moments stay, and they may come
back. The mean is a running one, over the tokens of all ranks, of the input as it is before dropout.

Only the abstract and secondary descriptions were at hand: the grouping by rows, the ramp from R / 2
to 3 R / 2, the 40 steps and the half are as those have them. Every layer is scaled by alpha / R, so
that a piece counts for as much wherever it lies.

Shapes: I in_features, O out_features, R rank of a site.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from sparse_lora_dist.methods.base import Method, MethodFactory, Plan
from sparse_lora_dist.methods.form import Form, Site, TensorSpec, kaiming_uniform, zeros
from sparse_lora_dist.methods.rewriting import Rewriting, Rewritten, Whole

EVERY = 40
"""Steps between two prunings, in runs that are long enough for ten of them."""


@dataclass(frozen=True, kw_only=True)
class PriloraOptions:
    """PRILoRA: ranks grow with depth, A is pruned"""

    prilora_first: int | None = None
    """Rank in the first layer; that of the last follows, since --rank is the mean. null: half of
    --rank."""
    prilora_sparsity: float = 0.5
    """Share of each row of A that a pruning zeroes, in [0, 1); 0 prunes nothing."""
    prilora_every: int | None = None
    """Steps between two prunings; null: 40, or a tenth of the run where that is less."""
    prilora_decay: float = 0.9
    """What stays of the running mean of squared inputs at each step, in [0, 1)."""

    def __post_init__(self) -> None:
        problems = []
        for name in ("prilora_sparsity", "prilora_decay"):
            if not 0.0 <= getattr(self, name) < 1.0:
                problems.append(f"{name} must be in [0, 1), got {getattr(self, name)}")
        for name in ("prilora_first", "prilora_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                problems.append(f"{name} must be at least 1, got {value}")
        if problems:
            raise ValueError("; ".join(problems))


def prilora(options: PriloraOptions, plan: Plan) -> Method:
    """Prunes A at every so many steps.

    Raises:
        ValueError: the ramp would end below rank 1.
    """
    ranks = ranks_of(plan.sites, options.prilora_first)
    every = options.prilora_every or min(EVERY, max(1, plan.total_steps // 10))

    def write(whole: Whole) -> Rewritten:
        return pruned(whole, options.prilora_sparsity)

    rewriting = Rewriting(
        at=lambda step: step > 0 and step % every == 0,
        write=write,
        reads_weight=False,
        squares_decay=options.prilora_decay,
    )
    return Method(
        name="prilora",
        form=lambda site: pair_of(site, ranks[site.name]),
        rewriting=rewriting if options.prilora_sparsity > 0.0 else None,
    )


def ranks_of(sites: Sequence[Site], first: int | None) -> dict[str, int]:
    """Site -> its rank."""
    depths = depths_of(sites)
    of_depth = ramp(len(set(depths.values())), sites[0].rank, first)
    return {name: of_depth[depth] for name, depth in depths.items()}


def depths_of(sites: Sequence[Site]) -> dict[str, int]:
    """Site -> its layer, counted from 0: by the first whole number in its name; where names have
    none, a layer is a site."""
    numbers = {site.name: re.search(r"(?:^|\.)(\d+)(?=\.|$)", site.name) for site in sites}
    if not all(numbers.values()):
        return {site.name: i for i, site in enumerate(sites)}
    layers = {name: int(found[1]) for name, found in numbers.items() if found}
    order = sorted(set(layers.values()))
    return {name: order.index(layer) for name, layer in layers.items()}


def ramp(layers: int, mean: int, first: int | None) -> list[int]:
    """Whole ranks along the line from ``first`` to 2 ``mean`` - ``first``, which add up to
    ``layers * mean`` exactly: differences of its rounded sums.

    Raises:
        ValueError: the last would be below 1.
    """
    first = max(1, mean // 2) if first is None else first
    if first >= 2 * mean:
        raise ValueError(
            f"prilora_first {first} and a mean of --rank {mean} leave {2 * mean - first} for the "
            f"last layer; take at most {2 * mean - 1}"
        )
    step = 2 * (mean - first) / max(layers - 1, 1)
    start = first if layers > 1 else mean
    sums = [round(n * start + step * n * (n - 1) / 2) for n in range(layers + 1)]
    return [after - before for before, after in zip(sums, sums[1:], strict=False)]


def pair_of(site: Site, rank: int) -> Form:
    """LoRA's pair of this rank. Without pieces: those of a site are counted by --rank."""
    a_shape, b_shape = (rank, site.in_features), (site.out_features, rank)
    return Form(
        tensors={
            "lora_a": TensorSpec(shape=a_shape, init=kaiming_uniform),
            "lora_b": TensorSpec(shape=b_shape, init=zeros),
        }
    )


def pruned(whole: Whole, sparsity: float) -> Rewritten:
    """A with the share ``sparsity`` of each row at zero, of equal ones the first."""
    a_RI = whole.tensors["lora_a"]
    scores_RI = a_RI.abs().double()
    if whole.squares_I is not None:
        scores_RI = scores_RI * whole.squares_I.sqrt()
    count = int(sparsity * a_RI.shape[1])
    least = scores_RI.argsort(dim=1, stable=True)[:, :count]
    a_RI = a_RI.scatter(1, least, 0.0)
    share = float((a_RI == 0).double().mean())
    return Rewritten(tensors={"lora_a": a_RI}, facts={"zeros_in_a": share})


PRILORA = MethodFactory(
    options=PriloraOptions, build=prilora, summary="ranks grow with depth, A is pruned by its input"
)
