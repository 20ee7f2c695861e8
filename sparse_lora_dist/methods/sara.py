"""SaRA: train the smallest entries of each weight, and select the smallest anew once in the run.

    y = (W + D) x           D is zero except at the N entries of smallest |W|, which train from zero

N is R (I + O), as many as LoRA of rank R has, or `sara_density` of the weight's entries. There is
no scale: `--alpha` has no meaning here.

The method decides before the first step, and again after the fraction `sara_reselect` of the run:
from then on the N entries of smallest |W + D| train. Entries that are selected again keep their
value in D. The value of an entry that is no longer selected stays in D, frozen, so D does not jump
and has up to 2 N entries. Adam's moments are reset. Of equal |W + D|, those first in the order of
`spread_order` are selected, not those of lowest index: a tenth of an NF4 base is exactly 0, and the
first N of those by index would lie in a few rows.

`sara_nuclear` is the weight of a smoothed nuclear norm of S = U Sigma V^T, the trained part of D.
With s the K-th singular value of S, the gradient is U min(Sigma / s, 1) V^T at the N
trained entries. It needs only the K leading singular pairs, which are computed by `POWER_STEPS`
subspace iterations from fixed vectors. If singular values are close, the iterations give a nearby
subspace, but a step against the resulting gradient still does not raise the norm. The smaller
singular values shrink too, because shrinking the leading ones alone would flatten the spectrum. For
scattered entries the term acts almost like weight decay. It costs five products of S with K vectors
per linear and step, and was not measured on language models, so it is 0 by default.

This implementation differs from the released code (github.com/sjtuplayer/SaRA, ea21192):

- Threshold: the released code trains all entries with |W| < t, in all tensors and biases. Their
  number is known only after the weights are read, but a trained tensor here needs its shape before
  that. So N is fixed here, the threshold t follows from it, and the second selection again selects
  N entries.
- Sign: the packed optimizer of the released code writes |values| into the model at the start and at
  the second selection, which flips negative weights until the next update.
- Low rank: the nuclear norm of the released code is that of W + D at the selected entries, by an
  SVD of one matrix drawn at random a step, and its gradient lands on a tensor that no optimizer
  steps, so it has no effect.
- Second selection: the packed optimizer of the released code skips the update of that step, and its
  dense one keeps the moments. Here moments are reset and no update is lost.
- Learning rate and decay: the released code takes 1e-3 exp(-350 t) unless given, and decays W + D.
  Here the rate is `--learning_rate`, and the trained values decay.

In short:

- **Optimizer state:** 8 bytes x trained entries: R (I + O) a linear, or `sara_density` x O x I.
- **Statistics:** none.
- **Exports as:** merged model or sparse delta.
- **Choose it when:** the entries that the base uses least are to change; up to twice as many
  entries change as train at a time.
- **Paper:** Hu et al. 2024, arXiv:2409.06633.

Shapes: T tokens, I in_features, O out_features, N entries that train, C entries that are no longer
trained, E entries of a weight, K singular pairs, L length of a side (O or I).
"""

from dataclasses import dataclass
from math import gcd

import torch
from torch import Tensor

from sparse_lora_dist.methods.protocol.form import Form, KeptSpec, Site, Tensors, TensorSpec, zeros
from sparse_lora_dist.methods.protocol.method import Method, MethodFactory, RunContext
from sparse_lora_dist.methods.protocol.rewriting import Rewriting, Rewritten, Whole
from sparse_lora_dist.methods.shared.hashed_random import uniform
from sparse_lora_dist.methods.shared.top_k import k_largest
from sparse_lora_dist.methods.shira import SparseProduct, scattered

PAIRS = 8
"""Number of singular pairs that the nuclear-norm term uses, written K in shapes."""

POWER_STEPS = 2
"""Number of subspace iterations for the nuclear-norm term. Each multiplies by S, the matrix of
trained entries, once and by S^T once."""


@dataclass(frozen=True, kw_only=True)
class SaraOptions:
    """SaRA: trains the smallest entries of the weights"""

    sara_density: float | None = None
    """Fraction of each weight's entries that train, in (0, 1). null: as many entries as LoRA of
    --rank has."""
    sara_reselect: float | None = 0.5
    """Fraction of the run after which the smallest entries are selected again, in [0, 1). 0 or
    null: never."""
    sara_nuclear: float = 0.0
    """Weight of the smoothed nuclear norm of the matrix of trained entries, at least 0; 0 turns it
    off."""

    def __post_init__(self) -> None:
        problems = []
        if self.sara_density is not None and not 0.0 < self.sara_density < 1.0:
            problems.append(f"--sara_density must be in (0, 1), got {self.sara_density}")
        if self.sara_reselect is not None and not 0.0 <= self.sara_reselect < 1.0:
            problems.append(f"--sara_reselect must be in [0, 1), got {self.sara_reselect}")
        if not 0.0 <= self.sara_nuclear < float("inf"):
            problems.append(f"--sara_nuclear must be at least 0, got {self.sara_nuclear}")
        if problems:
            raise ValueError("; ".join(problems))


def sara(options: SaraOptions, context: RunContext) -> Method:
    """Return the `Method` that describes SaRA to training, planning and export.

    Args:
        options: Values of the --sara options.
        context: Length and adapted linears of the run.

    Raises:
        ValueError: All entries of a weight would train, or --sara_reselect leaves no step before or
            after the second selection.
    """
    for site in sorted(context.sites, key=most_rank):
        check_count(site, options)
    switch = round((options.sara_reselect or 0.0) * context.total_steps)
    if options.sara_reselect and not 0 < switch < context.total_steps:
        raise ValueError(
            f"--sara_reselect is {options.sara_reselect}, a fraction of the run's "
            f"{context.total_steps} steps, which is step {switch}, but at least one step must come "
            "before it and one after. Take 0.5 in a run of at least 2 steps, or 0 to select "
            "once only"
        )

    def penalty(tensors: Tensors) -> dict[str, Tensor]:
        return {"sara_values": options.sara_nuclear * nuclear_gradient(tensors)}

    return Method(
        name="sara",
        form=lambda site: smallest_entries(site, options),
        penalty=penalty if options.sara_nuclear > 0.0 else None,
        rewriting=Rewriting(
            at=lambda step: step in (0, switch), write=choose, resets_moments=True, says=True
        ),
        # A longer run would select a third time, and there is room for entries that left once.
        redraws=switch == 0,
    )


def check_count(site: Site, options: SaraOptions) -> None:
    """Raise ValueError if all entries of the site's weight would train.

    Args:
        site: The linear that is adapted.
        options: Values of the --sara options.
    """
    weight, count = site.out_features * site.in_features, count_of(site, options)
    if count >= weight:
        raise ValueError(
            f"{site.name} is {site.out_features} x {site.in_features}. --rank {site.rank} makes "
            f"{count:,} entries train, but at most {weight - 1:,} may. "
            f"Take --rank {most_rank(site)} or less, or set --sara_density"
        )


def most_rank(site: Site) -> int:
    """Return the largest rank whose LoRA has fewer entries than the site's weight."""
    return (site.out_features * site.in_features - 1) // (site.out_features + site.in_features)


def count_of(site: Site, options: SaraOptions) -> int:
    """Return the number of entries that train at a site, at least 1.

    Args:
        site: The linear that is adapted.
        options: Values of the --sara options.
    """
    if options.sara_density is None:
        return site.rank * (site.in_features + site.out_features)
    return max(1, int(options.sara_density * site.in_features * site.out_features))


def smallest_entries(site: Site, options: SaraOptions) -> Form:
    """Return the form of a site with the delta y_TO = x D^T.

    D has the trained values and, if there is a second selection, the frozen values of entries that
    are no longer trained. It is zero elsewhere.

    Args:
        site: The linear that is adapted.
        options: Values of the --sara options.
    """
    count, weight = count_of(site, options), site.out_features * site.in_features
    places_dtype = torch.int32 if weight < 2**31 else torch.int64
    kept = {"sara_places": KeptSpec(shape=(count,), dtype=places_dtype)}
    if options.sara_reselect:
        left = (min(count, weight - count),)
        kept["sara_left_places"] = KeptSpec(shape=left, dtype=places_dtype)
        kept["sara_left_values"] = KeptSpec(shape=left)

    def drawn(seed: int, device: torch.device) -> dict[str, Tensor]:
        # On the CPU, since reading two numbers from the GPU would synchronise.
        return {"sara_shape": torch.tensor([site.out_features, site.in_features])}

    def delta(x_TI: Tensor, tensors: Tensors, scale: float) -> Tensor:
        values, places = entries(tensors)
        y_TO: Tensor = SparseProduct.apply(  # type: ignore[no-untyped-call]
            x_TI, values, places, site.out_features, count
        )
        return y_TO

    return Form(
        tensors={"sara_values": TensorSpec(shape=(count,), init=zeros)},
        drawn=drawn,
        kept=kept,
        delta=delta,
        to_lora=None,
        scale=lambda *_: 1.0,
    )


def entries(tensors: Tensors) -> tuple[Tensor, Tensor]:
    """Return the nonzero part of D, the change of the weight: its values and their indices.

    Entries that train come first, then entries that are no longer trained.

    Args:
        tensors: Tensors of the site.

    Returns:
        (values, indices in the flattened weight, int64).
    """
    values, places = tensors["sara_values"], tensors["sara_places"]
    if "sara_left_values" in tensors:
        values = torch.cat([values, tensors["sara_left_values"]])
        places = torch.cat([places, tensors["sara_left_places"]])
    return values, places.long()


def choose(whole: Whole) -> Rewritten:
    """Return the site's tensors after selecting the entries to train, those of smallest |W + D|.

    D, the change of the base weight W, stays the same. Before the first step D is zero.

    Raises:
        ValueError: More entries are no longer trained than there is room for.
    """
    weight_OI, before = whole.weight_OI(), whole.tensors["sara_places"]
    change_E = torch.zeros_like(weight_OI.flatten())
    # Before the first step nothing was selected, and all places are 0.
    if whole.step > 0:
        change_E = scattered(*entries(whole.tensors), *weight_OI.shape).flatten()
    places_N = first_of(-(weight_OI.flatten() + change_E).abs(), len(before))
    tensors = {"sara_places": places_N.to(before.dtype), "sara_values": change_E[places_N]}
    if "sara_left_places" in whole.tensors:
        # All entries that are not zero, filled up with zero entries, since places must differ.
        rest_E = change_E.abs().index_fill_(0, places_N, -1.0)
        room = len(whole.tensors["sara_left_places"])
        if int((rest_E > 0.0).sum()) > room:
            raise ValueError(
                f"more entries are no longer trained than there is room for ({room:,}), because "
                "the schedule was reset after the second selection, which SaRA does not support. "
                "Resume without --reset schedule"
            )
        places_C = first_of(rest_E, room)
        tensors["sara_left_places"] = places_C.to(before.dtype)
        tensors["sara_left_values"] = change_E[places_C]
    log_values = {"reselected": float((~torch.isin(places_N, before)).double().mean())}
    return Rewritten(tensors=tensors, log_values=log_values if whole.step > 0 else {})


def first_of(scores_E: Tensor, count: int) -> Tensor:
    """Return the indices of the ``count`` largest scores, ascending, int64 [count].

    Of equal scores, those that ``spread_order`` visits first are taken.

    Args:
        scores_E: Score of each entry of the flattened weight.
        count: Number of indices to return.
    """
    order_E = spread_order(len(scores_E), scores_E.device)
    return order_E[k_largest(scores_E[order_E], count)].sort().values


def spread_order(count: int, device: torch.device) -> Tensor:
    """Return 0 ... count - 1 in an order where neighbours are far from each other, int64 [count].

    Successive numbers differ by about 0.618 x count, modulo count. For count 8 the difference is 5,
    and the order 0 5 2 7 4 1 6 3.

    Args:
        count: How many numbers to order.
        device: Device of the result.
    """
    step = round(count * 0.6180339887498949)
    while gcd(step, count) != 1:
        step += 1
    return torch.arange(count, device=device) * step % count


def nuclear_gradient(tensors: Tensors) -> Tensor:
    """Return the gradient of the smoothed nuclear norm of S with respect to the trained values,
    [N].

    S is the matrix with the trained values at their entries. With S = U Sigma V^T and delta its
    K-th singular value (K is ``PAIRS``), the gradient is U min(Sigma / delta, 1) V^T, read at the
    trained entries.

    Args:
        tensors: Tensors of the site.
    """
    values_N, places_N = tensors["sara_values"].float(), tensors["sara_places"].long()
    num_out, num_in = tensors["sara_shape"].tolist()
    s_OI = scattered(values_N, places_N, num_out, num_in)
    v_IK, _ = polar(uniform((num_in, PAIRS), 1.0, 0, s_OI.device))
    for _ in range(POWER_STEPS):
        u_OK, _ = polar(s_OI @ v_IK)
        v_IK, _ = polar(s_OI.t() @ u_OK)
    sv_OK = s_OI @ v_IK
    u_OK, delta = polar(sv_OK)
    # u v^T of the leading pairs, and S / delta without its part in their subspace.
    more_OK = u_OK - sv_OK / delta
    return values_N / delta + (more_OK[places_N // num_in] * v_IK[places_N % num_in]).sum(dim=1)


def polar(y_LK: Tensor) -> tuple[Tensor, Tensor]:
    """Compute Y (Y^T Y)^(-1/2), the orthogonal factor of Y's polar decomposition.

    The result has the singular vectors of ``y_LK``. Its singular values are 1, or 0 where those of
    Y are negligible compared with the largest.

    Args:
        y_LK: The matrix Y.

    Returns:
        (the factor [L, K], the smallest singular value of Y that is not negligible, a scalar
            tensor).
    """
    squares_K, q_KK = torch.linalg.eigh(y_LK.t() @ y_LK)
    counts_K = squares_K > squares_K[-1] * PAIRS * torch.finfo(torch.float32).eps
    squares_K = torch.where(counts_K, squares_K, torch.inf)
    root_KK: Tensor = q_KK * squares_K.rsqrt() @ q_KK.t()
    return y_LK @ root_KK, squares_K.min().sqrt()


SARA = MethodFactory(
    options=SaraOptions,
    build=sara,
    summary="trains the smallest entries of the weights, selected twice",
    example="--sara_reselect 0.5",
)
