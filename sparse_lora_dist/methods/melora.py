"""MELoRA: put n mini-adapters side by side, each on a slice of the input and of the output.

    y = W x + blockdiag(s_1 B_1 A_1, ..., s_n B_n A_n) x            s_k = alpha / R_k

Mini-adapter k has the rank R_k. A_k (R_k x I/n) starts random, B_k (O/n x R_k) at zero. If every
R_k is `--rank` R, they have together as many parameters as LoRA of rank R, and give an update of
rank up to n R.

Nothing is decided: the number of mini-adapters and their ranks are fixed by `melora_blocks` and
`melora_ranks`.

This implementation differs from the released code (github.com/ChasonShi/MELoRA, 4ebb8b4):

- A linear whose sides n does not divide is refused. The released code ignores the features that
  remain.
- All mini-adapters have one alpha.
- The adapter can be exported.

In short:

- **Optimizer state:** 8 bytes x trained entries, as many as LoRA of the same `--rank`.
- **Statistics:** none.
- **Exports as:** PEFT LoRA of rank R_1 + ... + R_n (zeros outside the blocks), merged model or
  sparse delta.
- **Choose it when:** you want an update of high rank for the cost of a low one.
- **Paper:** Ren et al. 2024, arXiv:2402.17263.

Shapes: T tokens, I in_features, O out_features, n blocks, R `--rank`, R_k rank of mini-adapter
k.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import gcd

import torch
from torch import Tensor

from sparse_lora_dist.methods.protocol.form import (
    Form,
    Site,
    Tensors,
    TensorSpec,
    kaiming_uniform,
    zeros,
)
from sparse_lora_dist.methods.protocol.method import Method, MethodFactory, RunContext


@dataclass(frozen=True, kw_only=True)
class MeLoraOptions:
    """MELoRA: mini-adapters on slices of a linear"""

    melora_blocks: int = 2
    """Number of mini-adapters per linear, at least 1; must divide in_features and out_features of
    every linear."""
    melora_ranks: tuple[int, ...] = ()
    """Rank of each mini-adapter, at least 1; as many numbers as melora_blocks. Empty: --rank for
    every mini-adapter."""

    def __post_init__(self) -> None:
        problems = []
        if self.melora_blocks < 1:
            problems.append(f"--melora_blocks must be at least 1, got {self.melora_blocks}")
        if any(rank < 1 for rank in self.melora_ranks):
            problems.append(f"--melora_ranks must be at least 1, got {list(self.melora_ranks)}")
        if self.melora_ranks and len(self.melora_ranks) != self.melora_blocks:
            problems.append(
                f"--melora_ranks must be {self.melora_blocks} numbers, as many as --melora_blocks, "
                f"got {list(self.melora_ranks)}"
            )
        if problems:
            raise ValueError("; ".join(problems))


def melora(options: MeLoraOptions, context: RunContext) -> Method:
    """Return the `Method` that describes MELoRA to training, planning and export.

    Args:
        options: Values of the --melora options.
        context: Adapted linears of the run.

    Raises:
        ValueError: --melora_blocks does not divide both sides of every linear.
    """
    blocks = options.melora_blocks
    check_sides(context.sites, blocks)

    def form(site: Site) -> Form:
        ranks = options.melora_ranks or (site.rank,) * blocks
        a_shape = (sum(ranks), site.in_features // blocks)
        b_shape = (site.out_features // blocks, sum(ranks))

        def each(tensors: Tensors) -> Iterator[tuple[Tensor, Tensor, float]]:
            """Yield A, B and --rank / R_k of each mini-adapter; the last multiplies its scale."""
            parts = tensors["lora_a"].split(ranks), tensors["lora_b"].split(ranks, dim=1)
            for a, b, rank in zip(*parts, ranks, strict=True):
                yield a, b, site.rank / rank

        def delta(x_TI: Tensor, tensors: Tensors, scale: float) -> Tensor:
            parts = zip(x_TI.chunk(blocks, dim=-1), each(tensors), strict=True)
            return torch.cat([x @ a.t() * (scale * own) @ b.t() for x, (a, b, own) in parts], -1)

        def to_lora(tensors: Tensors) -> tuple[Tensor, Tensor]:
            a, b = zip(*((a, b * own) for a, b, own in each(tensors)), strict=True)
            return torch.block_diag(*a), torch.block_diag(*b)

        tensors = {
            "lora_a": TensorSpec(shape=a_shape, init=kaiming_uniform),
            "lora_b": TensorSpec(shape=b_shape, init=zeros),
        }
        return Form(tensors=tensors, delta=delta, to_lora=to_lora, own_rank=sum(ranks))

    return Method(name="melora", form=form)


def check_sides(sites: tuple[Site, ...], blocks: int) -> None:
    """Raise ValueError if ``blocks`` does not divide in_features and out_features of every linear.

    Args:
        sites: Linears that carry an adapter.
        blocks: Value of --melora_blocks.
    """
    common = gcd(*(side for site in sites for side in (site.in_features, site.out_features)))
    if common % blocks == 0:
        return
    odd = next(s for s in sites if s.in_features % blocks or s.out_features % blocks)
    whole = [n for n in range(1, common + 1) if common % n == 0]
    nearest = min(whole, key=lambda n: (abs(n - blocks), n))
    raise ValueError(
        f"--melora_blocks {blocks} does not divide both dimensions of {odd.name}, which is "
        f"{odd.out_features} x {odd.in_features}. The nearest number that divides those "
        f"of every linear is {nearest}. Give it"
    )


MELORA = MethodFactory(
    options=MeLoraOptions,
    build=melora,
    summary="trains mini-adapters on slices of each linear",
    example="--melora_blocks 4",
)
