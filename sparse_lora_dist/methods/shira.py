"""SHiRA and random masking: train chosen entries of each weight, and nothing else.

    y = (W + S) x           S is zero except at N entries, whose values train from zero

N is R (I + O), as many as LoRA of rank R has, or `shira_density` of the weight's entries. There is
no scale: `--alpha` has no meaning here.

The method decides once which N entries train, by `shira_support`:

    random      one entry in each of N equal parts of the flattened weight
    rows        evenly spaced rows and the diagonal, as many rows as fit into N (SHiRA-Struct)
    columns     evenly spaced columns and the diagonal, as many columns as fit into N
    magnitude   the N largest |W| (SHiRA-WM)
    gradient    the N largest |dL/dW| over the rows (sequences) of a step (SHiRA-Grad)
    snip        the N largest |W * dL/dW| (SHiRA-SNIP)

The first three follow from seed and shape, and their indices are computed anew at every use. The
others are chosen from whole weights, one linear at a time, and their indices are stored, sharded
over ranks. `gradient` and `snip` need calibration. Each of the first `shira_calibration_steps`
steps collects the gradient of its share of the linears, summed over all ranks. After each of these
steps all values are set to zero and Adam's moments are reset.

This implementation differs from the papers:

- `random` draws one entry per part, where the papers draw from all entries.
- The gradient of the values is computed at their entries only; the gradient of the whole weight is
  not computed.

In short:

- **Optimizer state:** 8 bytes x trained entries: R (I + O) a linear, or `shira_density` x O x I.
- **Statistics:** none; with support `gradient` or `snip` 4 bytes x base weights, sharded, during
  calibration.
- **Opens in PEFT alone:** the loading of adapters in transformers 5.23 itself (`load_adapter`, a
  pipeline over the adapter's folder) leaves out the indices, and puts the values elsewhere.
- **Exports as:** PEFT SHiRA (not with `shira_density`, `rows` or `columns`), merged model or sparse
  delta.
- **Choose it when:** the update is to be sparse from the first step.
- **Paper:** Bhardwaj et al. 2024, arXiv:2406.13175 (SHiRA); Xu and Zhang 2024, arXiv:2405.02596
  (random masking).

Shapes: T tokens, I in_features, O out_features, N entries that train.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from math import ceil, floor, log10
from typing import Any, Literal

import torch
from torch import Tensor

from sparse_lora_dist.methods.protocol.form import (
    Form,
    KeptSpec,
    PeftForm,
    Site,
    Tensors,
    TensorSpec,
    zeros,
)
from sparse_lora_dist.methods.protocol.method import Method, MethodFactory, RunContext
from sparse_lora_dist.methods.protocol.rewriting import Rewriting, Rewritten, Whole
from sparse_lora_dist.methods.shared.hashed_random import stratified
from sparse_lora_dist.methods.shared.top_k import k_largest

CHUNK = 2**24
"""Maximum number of products of a gradient and an input entry that are in memory at a time."""

Support = Literal["random", "rows", "columns", "magnitude", "gradient", "snip"]
CHOSEN: tuple[Support, ...] = ("magnitude", "gradient", "snip")
BY_GRADIENT: tuple[Support, ...] = ("gradient", "snip")


@dataclass(frozen=True, kw_only=True)
class ShiraOptions:
    """SHiRA: chosen entries of the weights train"""

    shira_density: float | None = None
    """Fraction of each weight's entries that train, in (0, 1]. null: as many entries as LoRA of
    --rank has."""
    shira_support: Support = "random"
    """Choice of the entries that train: random, rows or columns (evenly spaced, with the diagonal),
    magnitude (largest |weight|), gradient (largest |gradient|) or snip (largest |weight x
    gradient|)."""
    shira_calibration_steps: int = 1
    """Calibration steps for supports gradient and snip, at least 1 and fewer than the run has.
    Linears are split evenly over them, which lowers peak memory; updates of the adapters made
    during calibration are discarded. Modules trained in full train from the first step."""

    def __post_init__(self) -> None:
        problems = []
        if self.shira_density is not None and not 0.0 < self.shira_density <= 1.0:
            problems.append(f"--shira_density must be in (0, 1], got {self.shira_density}")
        if self.shira_calibration_steps < 1:
            problems.append(
                f"--shira_calibration_steps must be at least 1, got {self.shira_calibration_steps}"
            )
        if problems:
            raise ValueError("; ".join(problems))


def shira(options: ShiraOptions, context: RunContext) -> Method:
    """Return the `Method` that describes SHiRA to training, planning and export.

    Args:
        options: Values of the --shira options.
        context: Length and adapted linears of the run.

    Raises:
        ValueError: More entries would train than a weight has, fewer would train than the diagonal
            that --shira_support needs, or no step is left after calibration.
    """
    check_counts(context.sites, options)
    steps, support = options.shira_calibration_steps, options.shira_support
    if support in BY_GRADIENT and steps >= context.total_steps:
        raise ValueError(
            f"--shira_calibration_steps is {steps}, but the run has {context.total_steps} steps, "
            "and at least one must follow calibration. Take fewer calibration steps, or raise "
            "--max_steps"
        )
    notes = (cost_of_gradients(context, steps),) if support in BY_GRADIENT else ()
    return Method(
        name="shira",
        notes=notes,
        form=lambda site: chosen_entries(site, options),
        rewriting=choosing(support, steps) if support in CHOSEN else None,
    )


def cost_of_gradients(context: RunContext, steps: int) -> str:
    """Return the note for the user about the memory that calibration gradients take.

    Args:
        context: Adapted linears of the run.
        steps: Number of calibration steps.

    Returns:
        A sentence that names the GB over all ranks together; it is printed before training.
    """
    weights = sum(site.out_features * site.in_features for site in context.sites)
    held = 4e-9 * weights / steps
    return (
        f"calibration gradients take {held:,.2f} GB over all ranks together in the first steps "
        f"({steps}). Raise --shira_calibration_steps to lower this"
    )


def check_counts(sites: Sequence[Site], options: ShiraOptions) -> None:
    """Raise ValueError if the options do not fit the weights of all sites.

    They do not fit if more entries would train than a weight has. With support rows or columns,
    they do not fit either if fewer entries would train than the diagonal has. The message is of the
    weight that allows least.

    Args:
        sites: The linears that are adapted.
        options: Values of the --shira options.
    """
    density, support = options.shira_density, options.shira_support

    def asked(site: Site) -> str:
        option = f"--rank {site.rank}" if density is None else f"--shira_density {density}"
        shape, count = f"{site.out_features} x {site.in_features}", count_of(site, density)
        return f"{site.name} is {shape}. {option} makes {count:,} entries train"

    small = min(sites, key=_most_rank)
    if count_of(small, density) > _size(small):
        raise ValueError(
            f"{asked(small)}, but the weight has {_size(small):,}. "
            f"Take --rank {_most_rank(small)} or less"
        )
    short = max(sites, key=_least_density)
    if support in ("rows", "columns") and count_of(short, density) < _diagonal(short):
        raise ValueError(
            f"{asked(short)}, but --shira_support {support} trains the whole diagonal, which has "
            f"{_diagonal(short):,}. Take --shira_density {_rounded_up(_least_density(short)):g} "
            "or more"
        )


def _size(site: Site) -> int:
    return site.out_features * site.in_features


def _diagonal(site: Site) -> int:
    return min(site.out_features, site.in_features)


def _most_rank(site: Site) -> int:
    """Return the largest rank whose LoRA has no more entries than the site's weight."""
    return _size(site) // (site.out_features + site.in_features)


def _least_density(site: Site) -> float:
    """Return the share of a weight's entries that are on its diagonal."""
    return _diagonal(site) / _size(site)


def _rounded_up(share: float) -> float:
    """Return the next number of two digits that is not below ``share``."""
    digits = 1 - floor(log10(share))
    return ceil(share * 10.0**digits) / 10.0**digits


def count_of(site: Site, density: float | None) -> int:
    """Return the number of entries to train at a site, at least 1.

    Args:
        site: The linear that is adapted.
        density: Value of --shira_density. None: as many as LoRA of the site's rank has.
    """
    if density is None:
        return site.rank * (site.in_features + site.out_features)
    return max(1, int(density * site.in_features * site.out_features))


def chosen_entries(site: Site, options: ShiraOptions) -> Form:
    """Return the form of a site with the delta y_TO = x S^T, where S is zero except at the chosen
    entries.

    The tensor ``shira_places`` has the indices of these entries in the flattened weight.

    Args:
        site: The linear that is adapted.
        options: Values of the --shira options.
    """
    support, weight = options.shira_support, site.out_features * site.in_features
    count = wanted = count_of(site, options.shira_density)
    as_peft = options.shira_density is None and support not in ("rows", "columns")
    if support in ("rows", "columns"):
        count = structured_count(site, count, support)

    def drawn(seed: int, device: torch.device) -> dict[str, Tensor]:
        if support == "random":
            return {"shira_places": stratified(count, weight, seed, device)}
        if support in CHOSEN:
            return {}
        if device.type == "meta":  # the planner needs sizes only
            return {"shira_places": torch.empty(count, dtype=torch.int64, device=device)}
        return {"shira_places": structured(site, wanted, support).to(device)}

    def delta(x_TI: Tensor, tensors: Tensors, scale: float) -> Tensor:
        y_TO: Tensor = SparseProduct.apply(  # type: ignore[no-untyped-call]
            x_TI, tensors["shira_values"], tensors["shira_places"].long(), site.out_features
        )
        return y_TO

    def to_peft(tensors: Tensors, scale: float) -> PeftForm:
        places_N = tensors["shira_places"]
        rows_N, columns_N = places_N // site.in_features, places_N % site.in_features
        indices = torch.stack([rows_N, columns_N]).int()
        named = {"shira_weight": tensors["shira_values"], "shira_indices": indices}
        return PeftForm(kind="SHIRA", tensors=named, config={"r": site.rank})

    places = KeptSpec(shape=(count,), dtype=torch.int32 if weight < 2**31 else torch.int64)
    kept = {"shira_places": places} if support in CHOSEN else {}
    if support in BY_GRADIENT:
        kept["shira_settled"] = KeptSpec(shape=(1,), dtype=torch.uint8)
    return Form(
        tensors={"shira_values": TensorSpec(shape=(count,), init=zeros)},
        kept=kept,
        drawn=drawn,
        delta=delta,
        to_lora=None,
        to_peft=to_peft if as_peft else None,
        scale=lambda *_: 1.0,
    )


def lines_of(site: Site, count: int, support: Support) -> tuple[Tensor, int, int]:
    """Return which rows or columns of a weight train as a whole under support rows or columns.

    Args:
        site: The linear that is adapted.
        count: Number of entries that may train, the diagonal included.
        support: "rows" or "columns".

    Returns:
        Indices of the rows or columns (int64), the number of entries of one, and the length of the
            diagonal.
    """
    sides = site.out_features, site.in_features
    number, length = sides if support == "rows" else sides[::-1]
    some = max(0, (count - min(sides)) // length)
    return torch.arange(some) * number // max(some, 1), length, min(sides)


def structured_count(site: Site, count: int, support: Support) -> int:
    """Return how many entries ``structured`` selects for the same arguments, without selecting
    them.

    Args:
        site: The linear that is adapted.
        count: Number of entries that may train.
        support: "rows" or "columns".
    """
    lines_K, length, diagonal = lines_of(site, count, support)
    return len(lines_K) * length + diagonal - int((lines_K < diagonal).sum())


@cache
def structured(site: Site, count: int, support: Support) -> Tensor:
    """Return the entries of a weight that train under support rows or columns.

    They are the diagonal and as many evenly spaced rows or columns as fit into ``count`` entries
    beside it. For a 4 x 4 weight, 8 entries and support rows, the diagonal (4) and row 0 (4) give
    the indices 0 1 2 3 5 10 15: the entry (0, 0) is in both and counts once.

    Args:
        site: The linear that is adapted.
        count: Number of entries that may train.
        support: "rows" or "columns".

    Returns:
        Ascending indices in the flattened weight, int64 on the CPU, at most ``count``.
    """
    lines_K, length, diagonal = lines_of(site, count, support)
    along = torch.arange(length)
    in_lines = lines_K[:, None] * site.in_features + along
    if support == "columns":
        in_lines = lines_K[:, None] + along * site.in_features
    beside = torch.arange(diagonal)
    beside = beside[~torch.isin(beside, lines_K)] * (site.in_features + 1)
    return torch.cat([in_lines.flatten(), beside]).sort().values


def choosing(support: Support, steps: int) -> Rewriting:
    """Return the rewriting that selects the entries that train, those of the largest scores.

    Scores come from the weight before the first step (support magnitude), or from gradients.

    Args:
        support: "magnitude", "gradient" or "snip".
        steps: Number of calibration steps, whose gradients are used.
    """

    def write(whole: Whole) -> Rewritten:
        values_N, gradient_OI = whole.tensors["shira_values"], whole.gradient_OI
        if "shira_settled" in whole.tensors and whole.tensors["shira_settled"].any():
            return Rewritten()  # after --reset schedule the places stay
        # The values so far were trained at places that were not selected.
        tensors = {"shira_values": torch.zeros_like(values_N)}
        if support == "magnitude" or gradient_OI is not None:
            scores_OI = torch.ones(()) if support == "gradient" else whole.weight_OI().abs()
            if gradient_OI is not None:
                scores_OI = scores_OI * gradient_OI.abs()
            (places_N,) = k_largest(scores_OI, len(values_N)).flatten().nonzero(as_tuple=True)
            tensors["shira_places"] = places_N.to(whole.tensors["shira_places"].dtype)
        if whole.step == steps:
            tensors["shira_settled"] = torch.ones_like(whole.tensors["shira_settled"])
        return Rewritten(tensors=tensors)

    if support == "magnitude":
        return Rewriting(at=lambda step: step == 0, write=write)
    return Rewriting(
        at=lambda step: 0 < step <= steps,
        write=write,
        resets_moments=True,
        reads_weight=support == "snip",
        collects_gradient=lambda step, index: step <= steps and index % steps == step - 1,
    )


class SparseProduct(torch.autograd.Function):
    """Compute x S^T for a sparse S, with a gradient for x and for trained values of S.

    S has the values ``values_N`` at the indices ``places_N`` of the flattened matrix, and
    ``out_features`` rows. The first ``num_trained`` values get a gradient, which is computed at
    their indices only; None means all. The product uses S as a dense matrix, because GPUs multiply
    by one dense weight faster than they gather N columns.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_TI: Tensor,
        values_N: Tensor,
        places_N: Tensor,
        out_features: int,
        num_trained: int | None = None,
    ) -> Tensor:
        ctx.save_for_backward(x_TI, values_N, places_N)
        ctx.out_features, ctx.num_trained = out_features, num_trained
        return x_TI @ scattered(values_N, places_N, out_features, x_TI.shape[-1]).t()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_TI, values_N, places_N = ctx.saved_tensors
        (grad_TO,), width = grads, x_TI.shape[-1]
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = grad_TO @ scattered(values_N, places_N, ctx.out_features, width)
        flat_TO, flat_TI = grad_TO.flatten(0, -2), x_TI.flatten(0, -2)
        parts = places_N[: ctx.num_trained].split(max(1, CHUNK // max(1, len(flat_TI))))
        sums = [(flat_TO[:, p // width] * flat_TI[:, p % width]).sum(dim=0) for p in parts]
        grad_N = torch.zeros_like(values_N)
        grad_N[: ctx.num_trained] = torch.cat(sums)
        return grad_x, grad_N, None, None, None


def scattered(values_N: Tensor, places_N: Tensor, out_features: int, in_features: int) -> Tensor:
    """Return the dense matrix S with the given values at the given indices, and 0 elsewhere.

    Args:
        values_N: Values of S.
        places_N: Their indices in the flattened matrix, all different, int64.
        out_features: Number of rows of S.
        in_features: Number of columns of S.
    """
    flat = values_N.new_zeros(out_features * in_features)
    return flat.index_copy_(0, places_N, values_N).view(out_features, in_features)


SHIRA = MethodFactory(
    options=ShiraOptions,
    build=shira,
    summary="trains chosen entries of the weights",
    example="--shira_support snip --shira_calibration_steps 2",
)
