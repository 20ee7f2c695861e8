"""The record every method fills in, and plain LoRA's answers, which are the defaults.

A method is data and functions: no collectives of its own, no DeepSpeed, no inheritance. All
of them see single-device tensors; which rank holds what is the business of ``shards.py`` and
``zero3.py``.

Shapes: T tokens, I in_features, O out_features, R rank.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

Tensors = Mapping[str, Tensor]
Stats = tuple[Tensor, ...]
By = Literal["row", "column", "tensor"]
"""What is summed or ranked together: a matrix's row, its column, or all of it."""


class Score(Protocol):
    """Importance of one tensor, of which a rank may hold a part that begins and ends anywhere.

    Equal scores give equal bits on any number of ranks. ``top_k`` and ``sums`` are collectives, so
    a method calls them in the same order everywhere: in the order of its scores.
    """

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole tensor."""

    def top_k(self, k: int, by: By) -> Tensor:
        """This rank's part of the mask of the ``k`` largest of every segment, 1-D; ties: the
        lowest index first."""

    def sums(self, by: By) -> Tensor:
        """The sum of every segment, float64, whole on every rank."""

    def spread(self, values: Tensor, by: By) -> Tensor:
        """This rank's part of the tensor in which every entry has its segment's value, 1-D."""


Scores = Mapping[str, Score]


@dataclass(frozen=True, kw_only=True, slots=True)
class Site:
    """One linear of the base that carries a delta."""

    name: str
    in_features: int
    out_features: int
    rank: int


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorSpec:
    """A trained tensor of a site: its shape and its first values, from a seeded generator."""

    shape: tuple[int, ...]
    init: Callable[[Tensor, torch.Generator], None]
    """Fills an fp32 tensor of ``shape`` in place."""


def kaiming_uniform(t: Tensor, generator: torch.Generator) -> None:
    """U(-1/sqrt(I), 1/sqrt(I)) with I the last axis: what PEFT and loralib give A."""
    bound = 1.0 / math.sqrt(t.shape[-1])
    t.uniform_(-bound, bound, generator=generator)


def zeros(t: Tensor, generator: torch.Generator) -> None:
    """Zero, so that the delta starts at nothing."""
    t.zero_()


def low_rank_pair(site: Site) -> dict[str, TensorSpec]:
    """A (R x I) random, B (O x R) zero: Hu et al. 2021, arXiv:2106.09685, section 4.1."""
    return {
        "lora_a": TensorSpec(shape=(site.rank, site.in_features), init=kaiming_uniform),
        "lora_b": TensorSpec(shape=(site.out_features, site.rank), init=zeros),
    }


def low_rank_delta(x_TI: Tensor, tensors: Tensors, scale: float) -> Tensor:
    """y_TO = scale * x A^T B^T"""
    return (x_TI @ tensors["lora_a"].t()) @ tensors["lora_b"].t() * scale


def pair_itself(tensors: Tensors) -> tuple[Tensor, Tensor]:
    """(a_RI, b_OR) of the plain LoRA that gives the same delta."""
    return tensors["lora_a"], tensors["lora_b"]


def observe_nothing(stats: Stats, w: Tensor, grad: Tensor) -> Stats:
    """No statistics."""
    return stats


def first_statistic(stats: Stats) -> Tensor:
    """The only running statistic is the importance."""
    return stats[0]


def keep_everything(step: int, scores: Scores) -> dict[str, Tensor]:
    """No decision: an empty answer leaves every mask as it is."""
    return {}


def leave_alone(w: Tensor, learning_rate: float) -> Tensor:
    """No projection."""
    return w


@dataclass(frozen=True, kw_only=True, slots=True)
class Method:
    """Plain LoRA is ``Method(name="lora")``: every field has a do-nothing default."""

    name: str
    tensors: Callable[[Site], dict[str, TensorSpec]] = low_rank_pair
    """site -> the tensors it trains."""
    delta: Callable[[Tensor, Tensors, float], Tensor] = low_rank_delta
    """(x_TI, tensors, alpha / rank) -> y_TO, what the site adds to the base's output."""
    to_lora: Callable[[Tensors], tuple[Tensor, Tensor]] = pair_itself
    """tensors -> (a_RI, b_OR), the plain LoRA pair that is exported."""
    n_stats: int = 0
    """Running statistics per adapter entry, fp32, sharded like the gradient."""
    observe: Callable[[Stats, Tensor, Tensor], Stats] = observe_nothing
    """(stats, w, grad) -> stats, at each optimizer step. Elementwise, so exact on any shard."""
    score: Callable[[Stats], Tensor] = first_statistic
    """stats -> importance. Elementwise, so exact on any shard."""
    decides_at: Callable[[int], bool] = lambda step: False
    """step -> is a decision due?"""
    decide: Callable[[int, Scores], dict[str, Tensor]] = keep_everything
    """(step, {"site.tensor": score}) -> {"site.tensor": this rank's part of the live mask}.
    What it learns of other ranks it learns through the scores, so equal numbers give equal masks
    on every rank, with no broadcast."""
    project: Callable[[Tensor, float], Tensor] = leave_alone
    """(w, learning rate) -> w. Elementwise; runs inside ``optimizer.step`` on live entries."""


@dataclass(frozen=True, kw_only=True)
class NoOptions:
    """A method without options of its own."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MethodFactory:
    """How the configuration makes a method: its options' dataclass and what builds it.

    Each field of ``options`` becomes a command-line flag of the same name, so its name starts with
    the method's. ``build(options, total_steps)`` returns the record; it raises ``ValueError`` on
    options that do not fit the run.
    """

    options: type[Any]
    build: Callable[[Any, int], Method]
    summary: str
