"""SaRA: the smallest entries of the weights train, and once in the run others take their turn.

Hu et al. 2024, arXiv:2409.06633. W + D, D zero but at the N entries of smallest |W|, whose values
train from zero. N is R (I + O), what a LoRA of rank R has, or a share of the weight. Without a
scale: --alpha has no meaning here. After ``--sara_reselect`` of the run the N entries of smallest
|W + D| take over. One that stays keeps its value. The value of one that leaves stays in D, frozen;
so D is the same before and after, and can have up to 2 N entries. Adam's moments start anew.

Of equal entries those come first that ``spread_order`` visits first, not those of lowest index: an
NF4 base has about a tenth of its weights at exactly 0, and N of them by index would all lie in a
few rows.

The low-rank term adds ``--sara_nuclear`` times the nuclear norm of S, the trained part of D. The
release has an SVD a step, of one matrix drawn from all; here all count in each step, and the norm
is smoothed: with S = U Sigma V^T and delta its K-th singular value the gradient is

    U min(Sigma / delta, 1) V^T                     at the N places

which needs the K leading pairs only. They come from ``POWER_STEPS`` of subspace iteration from
fixed vectors, so where singular values lie close together they are those of a nearby subspace; what
it gives is never uphill. The leading pairs alone will not do: to shrink them and nothing else makes
the spectrum flatter. Scattered entries have a broad one, and there the term is little else than
decay of the values. It is 0 unless asked for: it costs five products of S with K vectors a linear
and step, the 5e-4 of the release is for another sum, and what it does to language models is not
measured.

Where we differ from the released code (github.com/sjtuplayer/SaRA, ea21192), on purpose:

    threshold   it trains |W| < t, of all tensors and biases; how many that are is known when the
                weights have been read, and a tensor here has its shape before. So t moves, and
                re-selection fills up to N, where its support can only shrink
    sign        its packed optimizer writes |values| into the model at the start and at the switch,
                so negative weights are flipped until the next update; here W + 0 is W
    low rank    its nuclear norm is of W + D at the support, and in the packed optimizer its
                gradient lands on a tensor that nothing steps: it does nothing there
    switch      the packed optimizer is built anew and skips the update of that step; the dense one
                keeps the moments. Here moments are reset, and no update is lost
    rate, decay its learning rate is 1e-3 exp(-350 t) unless given; here it is --learning_rate. Its
                weight decay draws W + D to zero, here it draws the trained values, so to W

Shapes: T tokens, I in_features, O out_features, N entries that train, C places for what has left,
E entries of a weight, K singular pairs, L of a side (O or I).
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
"""K."""

POWER_STEPS = 2
"""Of S^T and S in turn."""


@dataclass(frozen=True, kw_only=True)
class SaraOptions:
    """SaRA: the smallest entries of the weights train"""

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
            problems.append(f"sara_density must be in (0, 1), got {self.sara_density}")
        if self.sara_reselect is not None and not 0.0 <= self.sara_reselect < 1.0:
            problems.append(f"sara_reselect must be in [0, 1), got {self.sara_reselect}")
        if not 0.0 <= self.sara_nuclear < float("inf"):
            problems.append(f"sara_nuclear must be at least 0, got {self.sara_nuclear}")
        if problems:
            raise ValueError("; ".join(problems))


def sara(options: SaraOptions, context: RunContext) -> Method:
    """Chooses before the first step, and once more.

    Raises:
        ValueError: a weight has no more entries than are to train, or the run is too short to
            choose anew between two steps.
    """
    for site in context.sites:
        check_count(site, options)
    switch = round((options.sara_reselect or 0.0) * context.total_steps)
    if options.sara_reselect and not 0 < switch < context.total_steps:
        raise ValueError(
            f"sara_reselect is {options.sara_reselect}, which is after {switch} of the run's "
            f"{context.total_steps} steps, but at least one step must come before it and one "
            "after: take 0.5 in a run of at least 2 steps, or 0 to select once only"
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
        # A longer run would come to its share again, and there is room for one that leaves.
        redraws=switch == 0,
    )


def check_count(site: Site, options: SaraOptions) -> None:
    """Is something of a weight left that does not train?"""
    weight, count = site.out_features * site.in_features, count_of(site, options)
    if count >= weight:
        most = (weight - 1) // (site.out_features + site.in_features)
        raise ValueError(
            f"{site.name} is {site.out_features} x {site.in_features}: --rank {site.rank} makes "
            f"{count:,} entries train, but the weight has {weight:,} and not all may train; take "
            f"--rank {most} or less, or set --sara_density"
        )


def count_of(site: Site, options: SaraOptions) -> int:
    """N, at least 1."""
    if options.sara_density is None:
        return site.rank * (site.in_features + site.out_features)
    return max(1, int(options.sara_density * site.in_features * site.out_features))


def smallest_entries(site: Site, options: SaraOptions) -> Form:
    """y_TO = x D^T, D with the trained values and those that have left."""
    count, weight = count_of(site, options), site.out_features * site.in_features
    places_dtype = torch.int32 if weight < 2**31 else torch.int64
    kept = {"sara_places": KeptSpec(shape=(count,), dtype=places_dtype)}
    if options.sara_reselect:
        left = (min(count, weight - count),)
        kept["sara_left_places"] = KeptSpec(shape=left, dtype=places_dtype)
        kept["sara_left_values"] = KeptSpec(shape=left)

    def drawn(seed: int, device: torch.device) -> dict[str, Tensor]:
        # On the CPU, where reading two numbers waits for nothing.
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
    """(values, flat places) of all of D: those that train, then those that have left."""
    values, places = tensors["sara_values"], tensors["sara_places"]
    if "sara_left_values" in tensors:
        values = torch.cat([values, tensors["sara_left_values"]])
        places = torch.cat([places, tensors["sara_left_places"]])
    return values, places.long()


def choose(whole: Whole) -> Rewritten:
    """The N places of smallest |W + D| train from now on; D stays what it was."""
    weight_OI, before = whole.weight_OI(), whole.tensors["sara_places"]
    change_E = torch.zeros_like(weight_OI.flatten())
    # Before the first step nothing was chosen, and all places are 0.
    if whole.step > 0:
        change_E = scattered(*entries(whole.tensors), *weight_OI.shape).flatten()
    places_N = first_of(-(weight_OI.flatten() + change_E).abs(), len(before))
    tensors = {"sara_places": places_N.to(before.dtype), "sara_values": change_E[places_N]}
    if "sara_left_places" in whole.tensors:
        # All that is not zero, filled up with zeros: places must differ.
        rest_E = change_E.abs().index_fill_(0, places_N, -1.0)
        room = len(whole.tensors["sara_left_places"])
        if int((rest_E > 0.0).sum()) > room:
            raise ValueError(
                f"more entries have left the trained ones than there is room for ({room:,}): the "
                "schedule was reset after a re-selection, which SaRA does not support; resume "
                "without --reset schedule"
            )
        places_C = first_of(rest_E, room)
        tensors["sara_left_places"] = places_C.to(before.dtype)
        tensors["sara_left_values"] = change_E[places_C]
    log_values = {"reselected": float((~torch.isin(places_N, before)).double().mean())}
    return Rewritten(tensors=tensors, log_values=log_values if whole.step > 0 else {})


def first_of(scores_E: Tensor, count: int) -> Tensor:
    """The places of the ``count`` largest, ascending, int64; of equal ones the first visited."""
    order_E = spread_order(len(scores_E), scores_E.device)
    return order_E[k_largest(scores_E[order_E], count)].sort().values


def spread_order(count: int, device: torch.device) -> Tensor:
    """Every number below ``count`` once, int64, each far from the last few: by steps of about its
    golden section."""
    step = round(count * 0.6180339887498949)
    while gcd(step, count) != 1:
        step += 1
    return torch.arange(count, device=device) * step % count


def nuclear_gradient(tensors: Tensors) -> Tensor:
    """U min(Sigma / delta, 1) V^T at the places of S = U Sigma V^T, what trains of D [N]."""
    values_N, places_N = tensors["sara_values"].float(), tensors["sara_places"].long()
    num_out, num_in = tensors["sara_shape"].tolist()
    s_OI = scattered(values_N, places_N, num_out, num_in)
    v_IK, _ = polar(uniform((num_in, PAIRS), 1.0, 0, s_OI.device))
    for _ in range(POWER_STEPS):
        u_OK, _ = polar(s_OI @ v_IK)
        v_IK, _ = polar(s_OI.t() @ u_OK)
    sv_OK = s_OI @ v_IK
    u_OK, delta = polar(sv_OK)
    # u v^T of the leading pairs, and S / delta less what is theirs of it.
    more_OK = u_OK - sv_OK / delta
    return values_N / delta + (more_OK[places_N // num_in] * v_IK[places_N % num_in]).sum(dim=1)


def polar(y_LK: Tensor) -> tuple[Tensor, Tensor]:
    """(Y (Y^T Y)^(-1/2), in which singular values are 1, or 0 if they are so next to the largest;
    the smallest that is not)."""
    squares_K, q_KK = torch.linalg.eigh(y_LK.t() @ y_LK)
    counts_K = squares_K > squares_K[-1] * PAIRS * torch.finfo(torch.float32).eps
    squares_K = torch.where(counts_K, squares_K, torch.inf)
    root_KK: Tensor = q_KK * squares_K.rsqrt() @ q_KK.t()
    return y_LK @ root_KK, squares_K.min().sqrt()


SARA = MethodFactory(
    options=SaraOptions, build=sara, summary="the smallest entries of the weights, chosen twice"
)
