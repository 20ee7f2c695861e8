"""The record every method fills in, and plain LoRA's answers, which are the defaults.

A method is data and functions: no collectives of its own, no DeepSpeed, no inheritance. All
of them see single-device tensors; which rank holds what is the business of ``shards.py`` and
``zero3.py``.

Shapes: T tokens, I in_features, O out_features, R rank, S sites, K statistics a site.
"""

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, fields
from typing import Any, Literal, Protocol

from torch import Tensor

from sparse_lora_dist.methods.protocol.form import Form, Site, Tensors, TensorSpec, low_rank
from sparse_lora_dist.methods.protocol.rewriting import Rewriting

Stats = tuple[Tensor, ...]
By = Literal["row", "column", "tensor"]
"""What is summed or ranked together: a matrix's row, its column, or all of it."""


Ties = Literal["index", "all"]


class Scores(Protocol):
    """What a decision may ask about the tensors, "site.tensor", of which a rank holds parts only.

    Equal scores give equal bits on any number of ranks. ``top_k``, ``sums`` and ``live`` are
    collectives, a few for all tensors named together, so ask for many at once. A vector's entries
    are rows of one column.
    """

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Of the whole tensors; sites one after another, in the model's order."""

    @property
    def site_stats(self) -> Tensor:
        """What ``observe_sites`` made of the probes, float64 [K, S], whole on every rank."""

    def top_k(
        self, k: Mapping[str, int], by: Mapping[str, By], ties: Ties = "index"
    ) -> dict[str, Tensor]:
        """This rank's part of the mask of the ``k`` largest of every segment, 1-D. What equals the
        k-th: those of lowest index up to k, or all."""

    def sums(self, by: Mapping[str, By]) -> dict[str, Tensor]:
        """The sum of the scores of every segment, float64, whole on every rank."""

    def live(self, by: Mapping[str, By]) -> dict[str, Tensor]:
        """How many entries of every segment live, int64, whole on every rank."""

    def spread(self, name: str, values: Tensor, by: By) -> Tensor:
        """This rank's part of the tensor in which every entry has its segment's value, 1-D."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunContext:
    """The run a method is built for."""

    total_steps: int
    warmup_steps: int
    learning_rate: float
    """At its peak."""
    sites: tuple[Site, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Components:
    """The rank-1 components of a site."""

    computed: tuple[int, ...]
    """Those that its forward computes: all that are open, or can still be reached by a gradient."""
    open: int
    """How many count as its rank."""


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What changes at a step. What is not named stays as it was.

    What leaves the living is zero from the end of this step on. What has never lived keeps its
    first value. At step 0, which no optimizer step follows, nothing is zeroed.
    """

    live: Mapping[str, Tensor] = field(default_factory=dict)
    """"site.tensor" -> this rank's part of the mask of entries that are stepped and have
    moments."""
    zero: Mapping[str, Tensor] = field(default_factory=dict)
    """"site.tensor" -> this rank's part of the mask of entries that this step ends by zeroing,
    though they may live on and move again."""
    components: Mapping[str, Components] = field(default_factory=dict)
    """Site -> its components from the end of this step on."""
    log_values: Mapping[str, float] = field(default_factory=dict)
    """What the log says of it: keep fraction, budget, lambda ..."""


def observe_nothing(stats: Stats, w: Tensor, grad: Tensor, step: int) -> Stats:
    """No statistics."""
    return stats


def first_statistic(stats: Stats, w: Tensor) -> Tensor:
    """The first running statistic is the importance."""
    return stats[0]


def decide_nothing(step: int, scores: Scores) -> Decision:
    """Everything stays as it was."""
    return Decision()


@dataclass(frozen=True, kw_only=True, slots=True)
class Method:
    """Plain LoRA is ``Method(name="lora")``: every field has a do-nothing default.

    ``probe`` and ``penalty`` see the computed components of a site's tensors only, in place of all
    R.
    """

    name: str
    notes: tuple[str, ...] = ()
    """What the user should know before it starts."""
    form: Callable[[Site], Form] = low_rank
    """site -> what its delta is."""
    penalty: Callable[[Tensors], dict[str, Tensor]] | None = None
    """tensors -> gradients of what is added to the loss of every optimizer step, in closed form."""

    n_stats: int = 0
    """Running statistics per adapter entry, fp32, sharded like the gradient."""
    observe: Callable[[Stats, Tensor, Tensor, int], Stats] = observe_nothing
    """(stats, w, grad, step) -> stats, at each optimizer step. Elementwise, so exact on any
    shard."""
    score: Callable[[Stats, Tensor], Tensor] = first_statistic
    """(stats, w) -> importance. Elementwise, so exact on any shard."""
    probe: Callable[[Tensor, Tensor, Tensors, float], Tensor] | None = None
    """(x_TI, grad_y_TO, tensors, scale) -> one number of this site's backward; summed over
    micro-batches and ranks."""
    n_site_stats: int = 0
    """Running statistics per site (K), the same on every rank."""
    observe_sites: Callable[[Tensor, Tensor], Tensor] | None = None
    """(statistics [K, S], probes [S], both float64) -> statistics, at each optimizer step."""
    observes_until: int | None = None
    """The first decision at this step or later is the last, and the statistics' memory is returned
    after it. None: decisions never end."""

    decides_at: Callable[[int], bool] = lambda step: False
    """step -> is a decision due? Step 0 is before training: what lives and computes at first."""
    decide: Callable[[int, Scores], Decision] = decide_nothing
    """What it learns of other ranks it learns through the scores, so equal numbers give equal
    decisions on every rank, with no broadcast."""

    rewriting: Rewriting | None = None
    """None: what a site has is changed by optimizer steps and decisions alone. A method has one of
    the two: a step tells the log of one."""

    redraws: bool = True
    """May a resume change the length of the run, which draws the schedule anew, before the last
    decision is made?"""
    newborn_warmup: int | None = None
    """Steps in which the rate of an entry that comes to life during the run rises from 0; None: the
    run's own warm-up."""
    newborn_restarts: bool = False
    """Does such an entry see the whole learning-rate schedule anew, in the steps that are left?"""
    stages: tuple[int, ...] = ()
    """Last steps of the parts of the run that each have a learning-rate schedule, a checkpoint and
    a row in ``stages.jsonl`` of their own. Empty: the run is one."""
    stage_rate: Literal["own", "first"] = "own"
    """"first": only the first stage has a learning rate above 0."""
    stage_resets_moments: bool = False
    """Do moments start anew at each stage?"""

    def __post_init__(self) -> None:
        assert self.rewriting is None or self.decide is decide_nothing, self.name


@dataclass(frozen=True, kw_only=True)
class NoOptions:
    """A method without options of its own."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MethodFactory:
    """How the configuration makes a method: its options' dataclass and what builds it.

    Each field of ``options`` becomes a command-line flag of the same name, so its name starts with
    the method's. ``build(options, context)`` returns the record; it raises ``ValueError`` on
    options that do not fit the run.
    """

    options: type[Any]
    build: Callable[[Any, RunContext], Method]
    summary: str


def trained_specs(method: Method, sites: Sequence[Site]) -> dict[str, TensorSpec]:
    """ "site.tensor" -> its spec, in order; what all sites share stands at the first alone."""
    found: dict[str, TensorSpec] = {}
    for site in sites:
        for key, spec in method.form(site).tensors.items():
            if not spec.shared or site is sites[0]:
                found[f"{site.name}.{key}"] = spec
    return found


def site_names(scores: Scores) -> Sequence[str]:
    """The sites of the tensors that are scored, in the model's order."""
    return list(dict.fromkeys(name.rpartition(".")[0] for name in scores.shapes))


def as_preset(options: Any, preset: str, presets: Mapping[str, Mapping[str, Any]]) -> Any:
    """``options`` with the preset's value where one is None, or an empty list."""
    given = {f.name: getattr(options, f.name) for f in fields(options)}
    filled = copy(options)
    for name, value in presets[preset].items():
        if given[name] in (None, ()):
            # Not ``replace``: that would check the options again, from within their own check.
            object.__setattr__(filled, name, value)
    return filled
