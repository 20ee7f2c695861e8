"""LoSA: prune the base in rounds while it is trained, so that the merged model is sparse.

    y = (keep . (W + (alpha / R) B_r A_r)) x

W is the base weight of a linear, `keep` is a mask of 0 and 1 in the shape of W, and "." is the
product of entries. A_r and B_r are the first r of the adapter's R rank-1 components, where R is
`--rank`. So the adapter adds -W to an entry of the weight where `keep` is 0, and
(alpha / R) B_r A_r elsewhere.

The method decides `keep` and r of every linear in `losa_rounds` rounds t = 1 ... T. It reads the
running mean square of each input feature ("squares" below), and for each row (sequence) of the step
the mean of the linear's input over tokens. With s = `losa_sparsity` and spread = `losa_spread`:

    s_t = s - s (1 - t / T)^3                       sparsity in round t, on average over all linears
    score = |W + (alpha / R) B A| sqrt(squares)     the lowest in each row of W are pruned (Wanda)
    importance = exp(-mean linear CKA of the linear's inputs with those of the other linears)
    sparsity of the linear: from s_t + spread (least important) to s_t - spread (most important)
    error = (sum of squared scores that would be pruned at s_t) / (sum of all squared scores)
    r: in proportion to the linear's error

The average of r over linears is `losa_mean_rank` in the last round and one less in each earlier
one, but at least 1. Each round begins with fresh Adam moments, as in the released code.

This implementation differs from the released code (github.com/wzhuang-xmu/LoSA, 51b4e57):

- A linear can have up to R components. In the released code at most 8 exist, and higher ranks are
  cut.
- The r of a linear never falls, so that nothing learnt is lost.
- Importance is measured for each linear, not for each decoder layer.
- The sparsity of a linear deviates from s_t in proportion to how far its importance is from the
  mean over all weights, which keeps the average exactly. The released code solves a linear program
  (SLSQP), which gives nearly all linears either bound.
- The error of a linear is that of its own output, with its input features taken as uncorrelated.
- A pruned weight may return in a later round, because W itself is not changed.
- The statistics are those of the run's own batches.
- `--dropout` is refused, because it would bring pruned weights back at random.

In short:

- **Optimizer state:** 8 bytes x trained entries, as many as LoRA of the same `--rank`.
- **Statistics:** 8 bytes x input features of each linear; one bit x base weights for the mask.
- **Exports as:** merged model, its zeros exact.
- **Choose it when:** the merged model is to be sparse. It costs more time than LoRA: forward also
  multiplies the input by a matrix of the size of each adapted weight, and backward computes that
  matrix's gradient.
- **Paper:** Huang et al. 2025, arXiv:2502.14816.

Shapes: T tokens, I in_features, O out_features, R rank, N rows (sequences) of a step, S sites
(adapted linears), K numbers measured, G entries of a Gram matrix.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_lora_dist.methods.protocol.form import WEIGHT, Form, Site, Tensors, low_rank_pair
from sparse_lora_dist.methods.protocol.method import Method, MethodFactory, RunContext
from sparse_lora_dist.methods.protocol.rewriting import Rewriting, Rewritten, Whole, share_of
from sparse_lora_dist.methods.shared.bit_masks import mask_spec, pack, unpack

ROWS = 16
"""Maximum number of rows (sequences) of a step whose inputs are compared between linears."""
SORTED = 1024
"""Number of rows of a weight that are sorted at a time, which bounds memory."""


@dataclass(frozen=True, kw_only=True)
class LosaOptions:
    """LoSA: a sparse base and its low-rank update"""

    losa_sparsity: float = 0.5
    """Fraction of the base weights that are zero at the end, in [0, 1)."""
    losa_rounds: int = 5
    """Number of pruning rounds, at least 1: the first after step 1, the last after step 1 +
    losa_until x steps, equally spaced."""
    losa_until: float = 0.4
    """Fraction of the run's steps between the first pruning round and the last, in (0, 1)."""
    losa_mean_rank: int | None = None
    """Average rank after the last round, from 1 to --rank; one less in each earlier round. No
    linear exceeds --rank. null: five eighths of --rank."""
    losa_spread: float = 0.02
    """Maximum deviation of a linear's sparsity from the average, in [0, 1). Needs a global batch of
    at least 3 rows; with fewer, all linears get the average."""

    def __post_init__(self) -> None:
        problems = []
        if not 0.0 <= self.losa_sparsity < 1.0:
            problems.append(f"--losa_sparsity must be in [0, 1), got {self.losa_sparsity}")
        if self.losa_rounds < 1:
            problems.append(f"--losa_rounds must be at least 1, got {self.losa_rounds}")
        if not 0.0 < self.losa_until < 1.0:
            problems.append(f"--losa_until must be in (0, 1), got {self.losa_until}")
        if self.losa_mean_rank is not None and self.losa_mean_rank < 1:
            problems.append(f"--losa_mean_rank must be at least 1, got {self.losa_mean_rank}")
        if not 0.0 <= self.losa_spread < 1.0:
            problems.append(f"--losa_spread must be in [0, 1), got {self.losa_spread}")
        if problems:
            raise ValueError("; ".join(problems))


@dataclass(frozen=True, kw_only=True, slots=True)
class Round:
    """Targets of one pruning round, on average over all linears."""

    sparsity: float
    """Fraction of the base weights that are zero, in [0, 1)."""
    mean_rank: int
    """Open components per linear, at least 1."""


def losa(options: LosaOptions, context: RunContext) -> Method:
    """Return the `Method` that describes LoSA to training, planning and export.

    Args:
        options: Values of the --losa options.
        context: Length and adapted linears of the run.

    Raises:
        ValueError: The run has too few steps for the rounds, or --losa_mean_rank is above --rank.
    """
    rounds = rounds_of(options, context)
    return Method(
        name="losa",
        form=masked,
        rewriting=in_rounds(rounds, context.sites, options.losa_spread),
        redraws=False,
    )


def rounds_of(options: LosaOptions, context: RunContext) -> dict[int, Round]:
    """Plan the pruning rounds of a run: their steps and targets.

    Args:
        options: Values of the --losa options.
        context: Length and adapted linears of the run.

    Returns:
        {step: targets of the round that follows this step}; steps ascend.

    Raises:
        ValueError: The run has too few steps for the rounds, or --losa_mean_rank is above --rank.
    """
    count, capacity = options.losa_rounds, min(site.rank for site in context.sites)
    # At least one step follows the last round.
    last = min(int(options.losa_until * context.total_steps), context.total_steps - 2)
    if count > last + 1:
        raise ValueError(
            f"--losa_rounds is {count}, but up to --losa_until {options.losa_until} the run's "
            f"{context.total_steps} steps have room for {last + 1}. Take fewer rounds, or raise "
            "--max_steps"
        )
    final = options.losa_mean_rank or max(1, round(capacity * 5 / 8))
    if final > capacity:
        raise ValueError(
            f"--losa_mean_rank is {final}, but a linear has at most {capacity} components. "
            f"Take {capacity} or less, or raise --rank"
        )
    s = options.losa_sparsity
    return {
        1 + (t - 1) * last // max(1, count - 1): Round(
            sparsity=s - s * (1 - t / count) ** 3, mean_rank=max(1, final - count + t)
        )
        for t in range(1, count + 1)
    }


def masked(site: Site) -> Form:
    """Return the form of a site whose delta is y_TO = x_TI (keep * (W + scale B A) - W)^T.

    * is elementwise, W the base weight, scale is alpha / rank, and ``keep`` is the mask, which the
    kept tensor ``losa_pruned`` stores inverted. The delta is computed as -W where an entry is
    pruned and scale B A elsewhere, so that W + scale B A is never rounded to the dtype of x.
    """

    def delta(x_TI: Tensor, tensors: Tensors, scale: float) -> Tensor:
        update_OI = tensors["lora_b"] * scale @ tensors["lora_a"]
        pruned_OI = unpack(tensors["losa_pruned"], (site.out_features, site.in_features))
        return x_TI @ torch.where(pruned_OI, -tensors[WEIGHT], update_OI).t()

    return Form(
        tensors=low_rank_pair(site),
        kept={"losa_pruned": mask_spec(site)},
        reads_base=True,
        delta=delta,
        to_lora=None,
    )


def in_rounds(rounds: Mapping[int, Round], sites: tuple[Site, ...], spread: float) -> Rewriting:
    """Return the rewriting that opens one component per linear before training, then prunes in
    rounds.

    Args:
        rounds: {step: targets of the round that follows it}.
        sites: Linears that carry an adapter.
        spread: Largest deviation of a linear's sparsity from the average.
    """
    sizes_S = torch.tensor([site.out_features * site.in_features for site in sites]).double()
    capacities_S = torch.tensor([site.rank for site in sites]).double()

    def measure(whole: Whole) -> Tensor:
        if whole.step == 0:
            return torch.zeros(2 + ROWS * ROWS, dtype=torch.float64)
        gone = error(scores_of(whole), rounds[whole.step].sparsity)
        return torch.cat([torch.stack([gone, opened(whole)]).cpu(), gram(whole.rows_NI)])

    def write(whole: Whole) -> Rewritten:
        if whole.step == 0:
            return Rewritten(computed=tuple(range(int(opened(whole)))))
        now, measures_SK = rounds[whole.step], whole.measures_SK
        assert measures_SK is not None
        importance_S = torch.exp(-similarity(measures_SK[:, 2:]))
        sparsity_S = sparsities(importance_S, sizes_S, target=now.sparsity, spread=spread)
        total = now.mean_rank * len(sites)
        ranks_S = ranks(measures_SK[:, 0], measures_SK[:, 1], capacities_S, total)
        pruned_OI = lowest(scores_of(whole), float(sparsity_S[whole.index]))
        rank = int(ranks_S[whole.index])
        return Rewritten(
            tensors={"losa_pruned": pack(pruned_OI)},
            computed=tuple(range(rank)),
            log_values={"sparsity": share_of(pruned_OI), "rank": rank},
        )

    return Rewriting(
        at=lambda step: step == 0 or step in rounds,
        write=write,
        measure=measure,
        resets_moments=True,
        says=True,
        squares_decay=0.9,
        collects_rows=lambda step: step in rounds,
    )


def scores_of(whole: Whole) -> Tensor:
    """Return Wanda's score of each weight entry: |W + scale B A| * sqrt(mean squared input).

    Without mean squared inputs it is |W + scale B A|.

    Args:
        whole: A site with its tensors and statistics.

    Returns:
        Scores, fp32 [O, I].
    """
    tensors, w_OI = whole.tensors, whole.weight_OI()
    merged_OI = torch.addmm(w_OI, tensors["lora_b"], tensors["lora_a"], alpha=whole.scale)
    if whole.squares_I is None:
        return merged_OI.abs()
    return merged_OI.abs() * whole.squares_I.sqrt().to(w_OI)


def lowest(scores_OI: Tensor, share: float) -> Tensor:
    """Select the lowest scores in each row of a weight; of equal scores, those of the lowest index.

    Args:
        scores_OI: Scores of a weight's entries.
        share: Fraction of each row that is selected.

    Returns:
        The mask, bool [O, I]; True means selected.
    """
    count = round(share * scores_OI.shape[1])
    order = [rows.argsort(dim=1, stable=True)[:, :count] for rows in scores_OI.split(SORTED)]
    return torch.zeros_like(scores_OI, dtype=torch.bool).scatter_(1, torch.cat(order), True)


def error(scores_OI: Tensor, sparsity: float) -> Tensor:
    """Return how much of a linear's output a pruning would lose.

    It is the sum of the squared scores that would be pruned, divided by the sum of all.

    Args:
        scores_OI: Scores of a weight's entries.
        sparsity: Fraction of each row that would be pruned, lowest scores first.

    Returns:
        The lost fraction, a float64 scalar tensor in [0, 1].
    """
    squares_OI = scores_OI.square()
    gone_OI = torch.where(lowest(scores_OI, sparsity), squares_OI, 0.0)
    every = squares_OI.sum(dtype=torch.float64)
    return gone_OI.sum(dtype=torch.float64) / every.clamp(min=torch.finfo(torch.float32).tiny)


def opened(whole: Whole) -> Tensor:
    """Return the number of open components of a site, at least 1, as a float64 scalar tensor.

    It is the index (from 1) of the last component whose column of B is not zero.
    """
    moved_R = (whole.tensors["lora_b"] != 0).any(0).double()
    places_R = torch.arange(1, len(moved_R) + 1, device=moved_R.device)
    return (moved_R * places_R).max().clamp(min=1.0)


def gram(rows_NI: Tensor | None) -> Tensor:
    """Return the centred Gram matrix of a linear's inputs in the first ``ROWS`` rows (sequences).

    If there are fewer rows, the rest of the matrix is zero. It is all zero if ``rows_NI`` is None.

    Args:
        rows_NI: For each row of the step, the mean over tokens of the linear's input. None: not
            collected.

    Returns:
        The matrix, flattened, float64 [ROWS * ROWS] on the CPU.
    """
    if rows_NI is None:
        return torch.zeros(ROWS * ROWS, dtype=torch.float64)
    first_NI = rows_NI[:ROWS].cpu().double()
    centred_NI = first_NI - first_NI.mean(dim=0)
    missing = ROWS - len(first_NI)
    return F.pad(centred_NI @ centred_NI.t(), (0, missing, 0, missing)).flatten()


def similarity(grams_SG: Tensor) -> Tensor:
    """Return the mean linear CKA of each site's inputs with those of the other sites, [S].

    Linear CKA (centred kernel alignment) is the cosine between two centred Gram matrices.

    Args:
        grams_SG: Centred Gram matrix of each site's inputs, flattened.
    """
    unit_SG = F.normalize(grams_SG, dim=1)
    others_SG = unit_SG.sum(0) - unit_SG
    return (unit_SG * others_SG).sum(1) / max(1, len(unit_SG) - 1)


def sparsities(importance_S: Tensor, sizes_S: Tensor, *, target: float, spread: float) -> Tensor:
    """Return the sparsity of each site, the fraction of its weights to prune, [S].

    The mean over all weights is ``target``, no site deviates from it by more than ``spread``, and a
    more important site is never sparser than a less important one.

    Args:
        importance_S: Importance of each site.
        sizes_S: Number of weight entries of each site.
        target: Sparsity on average.
        spread: Largest deviation from ``target``.
    """
    behind_S = torch.dot(sizes_S / sizes_S.sum(), importance_S) - importance_S
    # 1e-4 is above rounding, so that sites of equal importance get equal sparsity.
    furthest = behind_S.abs().max().clamp(min=1e-4)
    return target + min(spread, target, 1 - target) * behind_S / furthest


def ranks(errors_S: Tensor, least_S: Tensor, most_S: Tensor, total: int) -> Tensor:
    """Return the number of components of each site, whole numbers in float64 [S].

    They are in proportion to the errors, within each site's bounds. They sum to ``total``, or to
    the nearest number that the bounds allow.

    Args:
        errors_S: Error of each site, as ``error`` returns it.
        least_S: Smallest number of components of each site.
        most_S: Largest number of components of each site.
        total: Number of components of all sites together.
    """
    total = min(max(total, int(least_S.sum())), int(most_S.sum()))
    largest = errors_S.max().clamp(min=torch.finfo(torch.float64).tiny)
    shares_S = (errors_S / largest).clamp(min=1e-9)
    low, high = 0.0, float((most_S / shares_S).max())
    for _ in range(100):
        middle = (low + high) / 2
        enough = (middle * shares_S).clamp(least_S, most_S).sum() >= total
        low, high = (low, middle) if enough else (middle, high)
    exact_S = (high * shares_S).clamp(least_S, most_S)
    ranks_S = exact_S.floor()
    by_remainder = (exact_S - ranks_S).argsort(descending=True, stable=True)
    ranks_S[by_remainder[: total - int(ranks_S.sum())]] += 1
    return ranks_S


LOSA = MethodFactory(
    options=LosaOptions,
    build=losa,
    summary="prunes the base in rounds, and sets ranks by the pruning error",
    example="--losa_rounds 2",
)
