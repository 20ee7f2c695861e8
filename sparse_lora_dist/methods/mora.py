"""MoRA: train one square matrix between a fixed compression of the input and a fixed decompression.

    y = W x + decompress(M compress(x))             M: H x H, H = round(sqrt((I + O) R))

M is the trained matrix. It starts at zero, has as many parameters as LoRA of rank R, and gives an
update of rank up to H. There is no scale: `--alpha` has no meaning here.

- Type 1, "sharing", is for large ranks. The features of x are cut into groups of H (the first
  features are repeated at the end if the last group is not full), and compress(x) is the sum of the
  groups. decompress repeats the H results until y is full.
- Type 6, "rotary", is for small ranks; H is even. Group g of x is rotated by the angles that a
  rotary embedding has at position g, M is applied to every group, and the results stand one after
  another in y.

The method decides only with `mora_restarts` (ReMoRA). The run is then cut into equal stages, each
with its own learning-rate schedule and Adam moments. At the end of each stage but the last, M is
merged into a frozen matrix and restarts at zero with the other grouping of features, so that ranks
add up (type 1: to 2 H). The two groupings take turns. In the contiguous one, group g of x has the
features g H to g H + H - 1. In the strided one, it has every G-th feature from g on, where G is the
number of groups. The features of y are grouped in the same way.

This implementation differs from the paper and its code:

- A restart adds M to a frozen fp32 H x H matrix beside the base, one for each grouping. The paper
  merges M into the weight, but a 4-bit base would round it away. The sum is exact, and two frozen
  matrices are enough for any number of restarts.
- With dropout, the frozen matrices too see the dropped input.
- Type 6 can be merged where I <= H. The released fork (github.com/kongds/MoRA, de5df31) cannot do
  that.

In short:

- **Optimizer state:** 8 bytes x trained entries, as many as LoRA of the same `--rank`.
- **Statistics:** none; with restarts 8 bytes x trained entries for the two frozen matrices.
- **Exports as:** merged model or sparse delta; its update is not a low-rank pair.
- **Choose it when:** much is to be memorised. With restarts its rank adds up, and forward applies
  three H x H matrices instead of one.
- **Paper:** Jiang et al. 2024, arXiv:2405.12130.

Shapes: T tokens, I in_features, O out_features, H side of M, G groups.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import sqrt
from typing import Literal

import torch
from torch import Tensor

from sparse_lora_dist.methods.protocol.form import Form, KeptSpec, Site, Tensors, TensorSpec, zeros
from sparse_lora_dist.methods.protocol.method import Method, MethodFactory, RunContext
from sparse_lora_dist.methods.protocol.rewriting import Rewriting, Rewritten, Whole
from sparse_lora_dist.methods.shared.device_tensors import kept_on_device
from sparse_lora_dist.methods.shared.schedules import warmed_up_stages

THETA = 10000.0
"""Base of the angles of the rotary embedding."""

Turn = int | Tensor
"""Grouping of the features that is in use: 0 contiguous, 1 strided. It is a tensor where it is read
from a kept tensor, because converting it to an int would wait for the device."""
Act = Callable[[Tensor, Tensor, Turn], Tensor]
"""Function (x_TI, m_HH, turn) -> y_TO that compresses x, applies the square matrix ``m_HH`` and
decompresses the result, in the grouping ``turn`` (0 contiguous, 1 strided)."""


@dataclass(frozen=True, kw_only=True)
class MoraOptions:
    """MoRA: a square matrix between fixed maps"""

    mora_type: Literal[1, 6] = 6
    """Mapping of input and output: 1 (sums and repeats, for large --rank) or 6 (rotated groups, for
    small --rank)."""
    mora_restarts: int = 0
    """Number of times that the square matrix is merged and restarted with another grouping of
    features (ReMoRA), at least 0. Each restart begins a learning-rate schedule of its own; 0 is
    MoRA without restarts."""

    def __post_init__(self) -> None:
        if self.mora_restarts < 0:
            raise ValueError(f"--mora_restarts must be at least 0, got {self.mora_restarts}")


def mora(options: MoraOptions, context: RunContext) -> Method:
    """Return the `Method` that describes MoRA to training, planning and export.

    Args:
        options: Values of the --mora options.
        context: Length, warm-up and adapted linears of the run.

    Raises:
        ValueError: The part of the run between two restarts is shorter than the warm-up.
    """
    action = shared if options.mora_type == 1 else rotated
    if options.mora_restarts == 0:
        return Method(name="mora", form=lambda site: square(*action(site)))
    stages = warmed_up_stages(
        context.total_steps,
        options.mora_restarts + 1,
        warmup_steps=context.warmup_steps,
        asked=f"--mora_restarts is {options.mora_restarts}",
    )
    return Method(
        name="mora",
        form=lambda site: with_merged(*action(site)),
        rewriting=Rewriting(at=lambda step: step in stages[:-1], write=merge, reads_weight=False),
        redraws=False,
        stages=stages,
        stage_resets_moments=True,
    )


def side_of(site: Site) -> int:
    """Return the number of rows (and columns) of the trained square matrix M of ``site``.

    The square has about as many entries as a LoRA pair of the site's rank.
    """
    return int(sqrt((site.in_features + site.out_features) * site.rank) + 0.5)


def shared(site: Site) -> tuple[int, Act]:
    """Return the side of M at ``site`` and the function that applies M in MoRA's type 1.

    The function sums the groups of x, applies M, and repeats the result along y.

    Returns:
        (side of M, function (x_TI, m_HH, turn) -> y_TO, see `Act`).
    """
    side = side_of(site)

    def act(x_TI: Tensor, m_HH: Tensor, turn: Turn) -> Tensor:
        x_TH = grouped(x_TI, side, turn).sum(dim=-2)
        return spread((x_TH @ m_HH.t()).unsqueeze(-2), site.out_features, turn)

    return side, act


def rotated(site: Site) -> tuple[int, Act]:
    """Return the side of M at ``site`` and the function that applies M in MoRA's type 6.

    The function rotates each group of x, applies M to it, and puts the results one after another in
    y.

    Returns:
        (side of M, an even number; function (x_TI, m_HH, turn) -> y_TO, see `Act`).
    """
    side = side_of(site) // 2 * 2

    def act(x_TI: Tensor, m_HH: Tensor, turn: Turn) -> Tensor:
        x_TGH = turned(grouped(x_TI, side, turn))
        return spread(x_TGH @ m_HH.t(), site.out_features, turn)

    return side, act


def square(side: int, act: Act) -> Form:
    """Return the form of a site without restarts, where M is the only tensor; its scale is always
    1.

    Args:
        side: Number of rows and columns of M.
        act: Function that applies M to the input, see `Act`.
    """

    def delta(x_TI: Tensor, tensors: Tensors, scale: float) -> Tensor:
        return act(x_TI, tensors["mora_m"], 0)

    tensors = {"mora_m": TensorSpec(shape=(side, side), init=zeros)}
    return Form(tensors=tensors, delta=delta, to_lora=None, scale=lambda *_: 1.0)


def with_merged(side: int, act: Act) -> Form:
    """Return the form of a site with restarts: the trained M, and two frozen matrices that hold the
    sums of earlier M's.

    The frozen matrices are kept tensors, one for the M's of each grouping of features. The kept
    tensor ``mora_turn`` has the grouping that M uses now: 0 contiguous, 1 strided.

    Args:
        side: Number of rows and columns of M.
        act: Function that applies a square matrix to the input, see `Act`.
    """

    def delta(x_TI: Tensor, tensors: Tensors, scale: float) -> Tensor:
        # Not one square per grouping: bf16 would round M away beside what was merged.
        y_TO = act(x_TI, tensors["mora_m"], tensors["mora_turn"])
        y_TO = y_TO + act(x_TI, tensors["mora_contiguous"], 0)
        return y_TO + act(x_TI, tensors["mora_strided"], 1)

    kept = {
        "mora_contiguous": KeptSpec(shape=(side, side)),
        "mora_strided": KeptSpec(shape=(side, side)),
        "mora_turn": KeptSpec(shape=(1,), dtype=torch.uint8),
    }
    return replace(square(side, act), delta=delta, kept=kept)


def merge(whole: Whole) -> Rewritten:
    """Return new tensors of a site at the end of a stage, where M is merged and starts anew.

    Features are grouped in one of two ways (``grouped``), and the site has a frozen matrix for
    each. M is added to that of the present grouping and becomes zero; the next stage uses the other
    grouping.

    Args:
        whole: The site's tensors, unsharded.

    Returns:
        The new values of the tensors that change, by short name.
    """
    m_HH, turn_1 = whole.tensors["mora_m"], whole.tensors["mora_turn"]
    into = "mora_strided" if turn_1.any() else "mora_contiguous"
    return Rewritten(
        tensors={
            "mora_m": torch.zeros_like(m_HH),
            into: whole.tensors[into] + m_HH,
            "mora_turn": 1 - turn_1,
        }
    )


def grouped(x_TI: Tensor, side: int, turn: Turn) -> Tensor:
    """Cut the features of x into groups of ``side`` features.

    If I is no multiple of ``side``, x is continued from its first features. For I = 5 and side 2,
    the contiguous groups are the features (0 1) (2 3) (4 0), the strided ones (0 3) (1 4) (2 0).

    Args:
        x_TI: Input of the linear, [T tokens, I in_features].
        side: Number of features in a group.
        turn: Grouping: 0 contiguous, 1 strided.

    Returns:
        x_TGH, [T, G, H] with G = ceil(I / side) groups and H = side.
    """
    width = x_TI.shape[-1]
    places_P = in_turn(places_in(width, side, x_TI.device), turn)
    x_TGH: Tensor = x_TI.index_select(-1, places_P).unflatten(-1, (-1, side))
    return x_TGH


def spread(y_TGH: Tensor, width: int, turn: Turn) -> Tensor:
    """Put groups of features back in their positions; the reverse of ``grouped``.

    The groups are repeated until y is full.

    Args:
        y_TGH: Groups of features, [T tokens, G groups, H features].
        width: Number of features of y.
        turn: Grouping: 0 contiguous, 1 strided.

    Returns:
        y_TO, [T, width].
    """
    groups, side = y_TGH.shape[-2:]
    places_O = in_turn(places_out(groups, side, width, y_TGH.device), turn)
    return y_TGH.flatten(-2).index_select(-1, places_O)


Places = tuple[Tensor, Tensor, Tensor]
"""Indices of features: contiguous, strided, and strided minus contiguous."""


def in_turn(places: Places, turn: Turn) -> Tensor:
    """Return the indices of one grouping."""
    return places[turn] if isinstance(turn, int) else places[0] + turn * places[2]


@kept_on_device
def places_in(width: int, side: int, device: torch.device) -> Places:
    """Return which of ``width`` features is at each place of the groups; see ``grouped``."""
    groups = -(-width // side)
    g_G1, h_H = torch.arange(groups, device=device)[:, None], torch.arange(side, device=device)
    contiguous = ((g_G1 * side + h_H) % width).flatten()
    strided = ((h_H * groups + g_G1) % width).flatten()
    return contiguous, strided, strided - contiguous


@kept_on_device
def places_out(groups: int, side: int, width: int, device: torch.device) -> Places:
    """Return the place in the groups of each of ``width`` features; see ``spread``."""
    o, all_groups = torch.arange(width, device=device), -(-width // side)
    contiguous = o // side % groups * side + o % side
    strided = o % all_groups % groups * side + o // all_groups
    return contiguous, strided, strided - contiguous


def turned(x_TGH: Tensor) -> Tensor:
    """Return x with group g rotated as by a rotary embedding at position g, in the shape of
    ``x_TGH``.

    Features j and j + H/2 of a group are rotated by the angle g * THETA^(-2 j / H).

    Args:
        x_TGH: Groups of features, [T tokens, G groups, H features]; H is even.
    """
    groups, side = x_TGH.shape[-2:]
    cos_GH, sin_GH = angles(groups, side, x_TGH.dtype, x_TGH.device)
    first, second = x_TGH.chunk(2, dim=-1)
    return torch.cat([first * cos_GH - second * sin_GH, second * cos_GH + first * sin_GH], dim=-1)


@kept_on_device
def angles(
    groups: int, side: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return cosine and sine of the angles of ``turned``, each [groups, side / 2]."""
    j_H = torch.arange(0, side, 2, device=device, dtype=torch.float32)
    angles_GH = torch.outer(torch.arange(groups, device=device), THETA ** (-j_H / side))
    return angles_GH.cos().to(dtype), angles_GH.sin().to(dtype)


MORA = MethodFactory(
    options=MoraOptions,
    build=mora,
    summary="trains a square matrix between fixed maps",
    example="--mora_restarts 2",
)
