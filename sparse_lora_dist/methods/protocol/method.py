"""Record that every method fills in; its defaults are plain LoRA.

A method is data and pure functions on single-device tensors: it calls no collective and no
DeepSpeed, and inherits from nothing. Which rank holds which slice is known to ``sparsity/`` and
``zero3/`` only. Each field that is a function says where it runs:

    local    one linear on one rank, with whole tensors on the rank's device
    shard    any slice of a tensor on one rank, flattened; must be elementwise
    global   the same arguments on all ranks; must return the same bits on all ranks

Tensors of all sites are named "site.tensor", e.g. "model.layers.3.self_attn.q_proj.lora_a".

Shapes: T tokens, I in_features, O out_features, R rank, S sites, K statistics a site, N entries of
a slice.
"""

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, fields
from typing import Any, Literal, Protocol

from torch import Tensor

from sparse_lora_dist.methods.protocol.form import Form, Site, Tensors, TensorSpec, low_rank
from sparse_lora_dist.methods.protocol.rewriting import Rewriting

Stats = tuple[Tensor, ...]
"""Running statistics of a slice, ``Method.n_stats`` tensors, fp32 [N] each."""
By = Literal["row", "column", "tensor"]
"""Segment within which entries are summed or ranked: a row, a column, or the whole tensor."""
Ties = Literal["index", "all"]
"""Entries equal to the k-th that `Scores.top_k` keeps: lowest indices up to k ("index"), or all."""


class Scores(Protocol):
    """Importance scores of all trained tensors, of which each rank holds a slice only.

    Equal scores give equal bits on any number of ranks. ``top_k``, ``sums`` and ``live`` make a few
    collectives for all tensors named in one call, so ask for many tensors at once. The entries of a
    vector are rows of one column.
    """

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shapes of the whole tensors by name; sites follow each other in the model's order."""

    @property
    def site_stats(self) -> Tensor:
        """Statistics of the sites from ``Method.observe_sites``, float64 [K, S], equal on all
        ranks."""

    def top_k(
        self, k: Mapping[str, int], by: Mapping[str, By], ties: Ties = "index"
    ) -> dict[str, Tensor]:
        """Select the largest scores of every segment. Collective.

        Args:
            k: Number of entries to select in each segment, by tensor name; at least 1.
            by: Segments of each tensor, by tensor name.
            ties: Entries to keep of those equal to the k-th.

        Returns:
            This rank's slice of each mask, bool [N].

        Raises:
            FloatingPointError: On all ranks, if a score of any rank is NaN or infinite.
        """

    def sums(self, by: Mapping[str, By]) -> dict[str, Tensor]:
        """Sum the scores of every segment: float64 [segments] by tensor name, equal on all ranks.
        Collective.

        Raises:
            FloatingPointError: On all ranks, if a score of any rank is NaN or infinite.
        """

    def live(self, by: Mapping[str, By]) -> dict[str, Tensor]:
        """Count the live entries of every segment: int64 [segments] by tensor name, equal on all
        ranks. Collective."""

    def spread(self, name: str, values: Tensor, by: By) -> Tensor:
        """Give every entry the value of its segment.

        Args:
            name: Tensor name.
            values: One value per segment, [segments], equal on all ranks.
            by: Segments of the tensor.

        Returns:
            This rank's slice of the result, [N].
        """


@dataclass(frozen=True, kw_only=True, slots=True)
class RunContext:
    """Run that a method is built for. The same on all ranks."""

    total_steps: int
    """Optimizer steps of the run, at least 1."""
    warmup_steps: int
    """Steps in which the learning rate rises from 0, at least 0."""
    learning_rate: float
    """Peak learning rate, above 0."""
    sites: tuple[Site, ...]
    """Linears that carry an adapter, in the model's order."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Components:
    """Rank-1 components of a site."""

    computed: tuple[int, ...]
    """Indices of the components that forward computes: the open ones, and those that a gradient can
    still reach; ascending."""
    open: int
    """Number of components that count as the site's rank."""


@dataclass(frozen=True, kw_only=True)
class Decision:
    """Change that a method makes at a step. Tensors and sites that are not named do not change.

    An entry that stops being live is zero from the end of this step on. An entry that was never
    live keeps its initial value. At step 0, before training, nothing is zeroed.
    """

    live: Mapping[str, Tensor] = field(default_factory=dict)
    """Tensor name -> this rank's slice of the mask of live entries, bool [N]."""
    zero: Mapping[str, Tensor] = field(default_factory=dict)
    """Tensor name -> this rank's slice of the mask of entries that are zeroed after this optimizer
    step, bool [N]. They may stay live and move again."""
    components: Mapping[str, Components] = field(default_factory=dict)
    """Site name -> its components from the end of this step on; equal on all ranks."""
    log_values: Mapping[str, float] = field(default_factory=dict)
    """Numbers for the metrics, e.g. keep fraction, budget, lambda; equal on all ranks."""


def observe_nothing(stats: Stats, w: Tensor, grad: Tensor, step: int) -> Stats:
    """Return the statistics unchanged."""
    return stats


def first_statistic(stats: Stats, w: Tensor) -> Tensor:
    """Return the first running statistic as the importance."""
    return stats[0]


def decide_nothing(step: int, scores: Scores) -> Decision:
    """Return a decision that changes nothing."""
    return Decision()


@dataclass(frozen=True, kw_only=True, slots=True)
class Method:
    """Method as data and functions. Defaults are plain LoRA, ``Method(name="lora")``.

    A *newborn* entry is one that becomes live during the run. The ``tensors`` that ``probe`` and
    ``penalty`` get are those that ``Form.delta`` gets: cut to the computed components.
    """

    name: str
    """Name of the method, the value of --method."""
    notes: tuple[str, ...] = ()
    """Sentences that are printed before training, for what the user should know."""
    form: Callable[[Site], Form] = low_rank
    """site -> form of its delta. Called by adapter injection, planner and exports. Runs: global."""
    penalty: Callable[[Tensors], dict[str, Tensor]] | None = None
    """tensors -> gradients by tensor name, shaped like the tensors, of what is added to the loss of
    an optimizer step. Called by the adapter in backward, once a micro-batch. Runs: local. None:
    nothing is added."""

    n_stats: int = 0
    """Number of running statistics per trained entry, fp32 each, sharded like the gradient."""
    observe: Callable[[Stats, Tensor, Tensor, int], Stats] = observe_nothing
    """(stats, w, grad, step) -> stats, all fp32 [N]; grad is the step's gradient of all
    ranks. Called by `Shards` at each optimizer step, before the decision. Runs: shard."""
    score: Callable[[Stats, Tensor], Tensor] = first_statistic
    """(stats, w) -> importance, fp32 [N] each. Called by `Scores` in a decision. Runs: shard."""
    probe: Callable[[Tensor, Tensor, Tensors, float], Tensor] | None = None
    """(x_TI, grad_y_TO, tensors, scale) -> one number, scalar. Called by the adapter in each
    backward; summed over micro-batches, averaged over ranks. Runs: local. None: no probe."""
    n_site_stats: int = 0
    """K, number of running statistics per site, float64 each, equal on all ranks."""
    observe_sites: Callable[[Tensor, Tensor], Tensor] | None = None
    """(statistics [K, S], probes [S]) -> statistics [K, S], all float64 on the CPU. Called by
    `Shards` at each optimizer step, after the probes were reduced. Runs: global. None: no
    statistics of sites."""
    observes_until: int | None = None
    """Step from which the next decision is the last; the memory of the statistics is freed after
    it. None: there is no last decision."""

    decides_at: Callable[[int], bool] = lambda step: False
    """step -> True if a decision is due. Step 0, before training, sets the live entries and the
    computed components at the start. Called by `Shards` at each step. Runs: global."""
    decide: Callable[[int, Scores], Decision] = decide_nothing
    """(step, scores) -> decision. Called by `Shards` between backward and optimizer step. Runs:
    global. The scores are the only source of what other ranks hold, so equal scores give equal
    decisions on all ranks without a broadcast."""

    rewriting: Rewriting | None = None
    """Rewriting of whole tensors at some steps. None: only optimizer steps and decisions change a
    site. A method has a rewriting or decisions, not both, because a step logs one of them."""

    redraws: bool = True
    """True: a resume may change the length of the run before the last decision, which recomputes
    the schedule."""
    newborn_warmup: int | None = None
    """Steps in which the learning rate of a newborn entry rises from 0. None: --warmup_steps."""
    newborn_restarts: bool = False
    """True: a newborn entry sees the whole learning-rate schedule in the remaining steps."""
    stages: tuple[int, ...] = ()
    """Last step of each stage; a stage has a learning-rate schedule, a checkpoint and a record in
    ``stages.jsonl`` of its own. Empty: the run has no stages."""
    stage_rate: Literal["own", "first"] = "own"
    """Stages whose learning rate is above 0: each with its own schedule ("own"), or the first only
    ("first")."""
    stage_resets_moments: bool = False
    """True: Adam's moments are reset at the start of each stage."""

    def __post_init__(self) -> None:
        assert self.rewriting is None or self.decide is decide_nothing, self.name


@dataclass(frozen=True, kw_only=True)
class NoOptions:
    """Options of a method that has none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MethodFactory:
    """Entry of a method in `METHODS`: its options, how it is built, and how it is introduced.

    The documentation page of a method is made of its module docstring and of this record
    (``docs/generate_methods.py``).
    """

    options: type[Any]
    """Frozen dataclass of the method's options. Each field becomes a command-line flag of that
    name, so names start with the method's name; its ``__post_init__`` raises ``ValueError``."""
    build: Callable[[Any, RunContext], Method]
    """(options, context) -> method; raises ``ValueError`` if the options do not fit the run. Called
    by the training program, the planner and exports. Runs: global."""
    summary: str
    """Phrase of a few words for --help and tables: what the method does."""
    example: str = ""
    """Flags of a short run, 6 steps of a small model, for the documentation page."""


def trained_specs(method: Method, sites: Sequence[Site]) -> dict[str, TensorSpec]:
    """Return the spec of every trained tensor by name "site.tensor", in the model's order.

    A tensor that all sites share is listed once, at the first site.
    """
    found: dict[str, TensorSpec] = {}
    for site in sites:
        for key, spec in method.form(site).tensors.items():
            if not spec.shared or site is sites[0]:
                found[f"{site.name}.{key}"] = spec
    return found


def site_names(scores: Scores) -> Sequence[str]:
    """Return the names of the sites whose tensors are scored, in the model's order."""
    return list(dict.fromkeys(name.rpartition(".")[0] for name in scores.shapes))


def as_preset(options: Any, preset: str, presets: Mapping[str, Mapping[str, Any]]) -> Any:
    """Return a copy of ``options`` in which fields that are None or empty have the preset's value.

    Args:
        options: Options of a method.
        preset: Name of the preset.
        presets: Preset name -> {field name: value}.
    """
    given = {f.name: getattr(options, f.name) for f in fields(options)}
    filled = copy(options)
    for name, value in presets[preset].items():
        if given[name] in (None, ()):
            # Not ``replace``, which would run ``__post_init__`` from within ``__post_init__``.
            object.__setattr__(filled, name, value)
    return filled
