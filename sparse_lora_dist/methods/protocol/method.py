"""`Method`, the dataclass that every method fills in; its defaults are plain LoRA.

A method is data and pure functions on single-device tensors: it calls no collective and no
DeepSpeed, and inherits from nothing. Only ``sparsity/`` and ``zero3/`` know which rank holds which
slice of a tensor. Each field that is a function says where it runs:

    local    one linear on one rank, with whole tensors on the rank's device
    shard    any slice of a tensor on one rank, flattened; must be elementwise
    global   the same arguments on all ranks; must return the same bits on all ranks

Tensors of all sites are named "site.tensor", e.g. "model.layers.3.self_attn.q_proj.lora_a". A
*site* is a linear that carries an adapter. A *segment* is a row, a column or the whole of a tensor,
see `By`. A *live* entry is an entry of a trained tensor that the optimizer steps.

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
"""Running statistics of a slice of N entries: as many tensors as ``Method.n_stats`` says, fp32 [N]
each."""
By = Literal["row", "column", "tensor"]
"""Segments that a tensor is divided into, and within which entries are summed or ranked: each row
("row"), each column ("column"), or the whole tensor as one segment ("tensor")."""
Ties = Literal["index", "all"]
"""Which entries ``Scores.top_k`` keeps of those whose score equals the k-th largest: those of
lowest index until k entries are kept ("index"), or all of them, even if more than k are kept
("all")."""


class Scores(Protocol):
    """Importance scores of all trained tensors. Each rank holds one slice of every tensor's scores.

    The results of ``top_k``, ``sums`` and ``live`` have the same bits on any number of ranks. All
    ranks must call them. Each call makes a few collectives, however many tensors it names, so name
    many tensors in one call. A vector counts as a matrix with one column, in which each entry is a
    row.
    """

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Unsharded shape of each trained tensor. Keys are full names, such as
        "model.layers.0.self_attn.q_proj.lora_a", site after site in the model's order."""

    @property
    def site_stats(self) -> Tensor:
        """Running statistics of the sites, float64 [K, S], equal on all ranks.

        K is ``Method.n_site_stats`` and S the number of sites, in the model's order.
        ``Method.observe_sites`` updates the statistics.
        """

    def top_k(
        self, k: Mapping[str, int], by: Mapping[str, By], ties: Ties = "index"
    ) -> dict[str, Tensor]:
        """Select the ``k`` largest scores in every segment: every row, every column or the whole
        tensor.

        All ranks must call it.

        Args:
            k: Tensor name -> number of entries to select in each of the tensor's segments, at least
                1.
            by: Tensor name -> what a segment of the tensor is: "row", "column" or "tensor".
            ties: Which of the entries equal to the k-th largest are kept: "index" (the lowest
                indices, so that exactly k are kept) or "all".

        Returns:
            Tensor name -> this rank's slice of the mask, bool [N]; True means selected.

        Raises:
            FloatingPointError: On all ranks, if a score of any rank is NaN or infinite.
        """

    def sums(self, by: Mapping[str, By]) -> dict[str, Tensor]:
        """Sum the scores in every segment: every row, every column or the whole tensor.

        All ranks must call it.

        Args:
            by: Tensor name -> what a segment of the tensor is: "row", "column" or "tensor".

        Returns:
            Tensor name -> sums, float64 [number of segments], equal on all ranks.

        Raises:
            FloatingPointError: On all ranks, if a score of any rank is NaN or infinite.
        """

    def live(self, by: Mapping[str, By]) -> dict[str, Tensor]:
        """Count the live entries in every segment: every row, every column or the whole tensor.

        A live entry is one that the optimizer steps. All ranks must call it.

        Args:
            by: Tensor name -> what a segment of the tensor is: "row", "column" or "tensor".

        Returns:
            Tensor name -> counts, int64 [number of segments], equal on all ranks.
        """

    def spread(self, name: str, values: Tensor, by: By) -> Tensor:
        """Copy one value per segment (row, column or whole tensor) to all entries of that segment.

        It makes no collective.

        Args:
            name: Tensor name.
            values: One value per segment, [number of segments], equal on all ranks.
            by: What a segment of the tensor is: "row", "column" or "tensor".

        Returns:
            This rank's slice of the result, [N], in the dtype of ``values``.
        """


@dataclass(frozen=True, kw_only=True, slots=True)
class RunContext:
    """Facts about the run that ``MethodFactory.build`` makes a method from; the same on all
    ranks."""

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
    """Which rank-1 components of a site are computed, and how many are open."""

    computed: tuple[int, ...]
    """Ascending indices of the components that forward computes: the open ones, and those that are
    closed but still get a gradient."""
    open: int
    """Number of open components, which is reported as the site's rank."""


@dataclass(frozen=True, kw_only=True)
class Decision:
    """Changes that a method makes at one step, returned by ``Method.decide``.

    Tensors and sites that are not named stay as they are. A live entry is one that the optimizer
    steps. An entry that stops being live is zero from the end of this step on. An entry that was
    never live keeps its initial value. At step 0, before training, nothing is zeroed.
    """

    live: Mapping[str, Tensor] = field(default_factory=dict)
    """Tensor name -> this rank's slice of the mask of live entries, bool [N]. The optimizer steps
    live entries only."""
    zero: Mapping[str, Tensor] = field(default_factory=dict)
    """Tensor name -> this rank's slice of the mask of entries that are set to zero after this
    optimizer step, bool [N]. They may stay live, and then move again at the next step."""
    components: Mapping[str, Components] = field(default_factory=dict)
    """Site name -> components of the site from the end of this step on; equal on all ranks."""
    log_values: Mapping[str, float] = field(default_factory=dict)
    """Numbers that are logged with the metrics, by name, e.g. keep fraction, budget, lambda; equal
    on all ranks."""


def observe_nothing(stats: Stats, w: Tensor, grad: Tensor, step: int) -> Stats:
    """Return ``stats`` unchanged: the default of ``Method.observe``, for methods without
    statistics.

    Args:
        stats: Running statistics of a slice; an empty tuple in such methods.
        w: Unused.
        grad: Unused.
        step: Unused.
    """
    return stats


def first_statistic(stats: Stats, w: Tensor) -> Tensor:
    """Return the first running statistic as the importance of each entry, fp32 [N]: the default of
    ``Method.score``.

    Args:
        stats: Running statistics of a slice, fp32 [N] each; at least one.
        w: Unused.
    """
    return stats[0]


def decide_nothing(step: int, scores: Scores) -> Decision:
    """Return an empty decision, which changes nothing: the default of ``Method.decide``.

    Args:
        step: Unused.
        scores: Unused.
    """
    return Decision()


@dataclass(frozen=True, kw_only=True, slots=True)
class Method:
    """Description of a method: data and functions. The defaults make plain LoRA,
    ``Method(name="lora")``.

    A *newborn* entry is one that becomes live during the run; a live entry is one that the
    optimizer steps. ``probe`` and ``penalty`` get the same dict of tensors as ``Form.delta``, with
    only those components that forward computes.
    """

    name: str
    """Name of the method, the value of --method."""
    notes: tuple[str, ...] = ()
    """Sentences for the user that are printed before training."""
    form: Callable[[Site], Form] = low_rank
    """Function (site) -> form of its delta, i.e. the tensors of the site and how they act. Called
    by adapter injection, the planner and exports. Runs: global."""
    penalty: Callable[[Tensors], dict[str, Tensor]] | None = None
    """Function (tensors) -> gradients of a penalty by tensor name, each shaped like its tensor. The
    penalty counts once per optimizer step: the adapter calls the function in the backward of every
    micro-batch and divides the result by the number of micro-batches. Runs: local. None: there is
    no penalty."""

    n_stats: int = 0
    """Number of running statistics per trained entry, fp32 each. They are sharded like the
    gradient."""
    observe: Callable[[Stats, Tensor, Tensor, int], Stats] = observe_nothing
    """Function (stats, w, grad, step) -> updated stats; all tensors are fp32 [N]. ``grad`` is the
    gradient of the step, already reduced over all ranks. Called by `Shards` at each optimizer step,
    before the decision. Runs: shard."""
    score: Callable[[Stats, Tensor], Tensor] = first_statistic
    """Function (stats, w) -> importance of each entry, fp32 [N], from its statistics and its value.
    Called by `Scores` when ``decide`` asks for scores. Runs: shard."""
    probe: Callable[[Tensor, Tensor, Tensors, float], Tensor] | None = None
    """Function (x_TI, grad_y_TO, tensors, scale) -> one number, a scalar tensor. Called by the
    adapter in each backward; the results are summed over micro-batches and averaged over ranks.
    Runs: local. None: no number is collected."""
    n_site_stats: int = 0
    """Number of running statistics per site, written K in shapes; float64, equal on all ranks."""
    observe_sites: Callable[[Tensor, Tensor], Tensor] | None = None
    """Function (statistics [K, S], probes [S]) -> updated statistics [K, S], all float64 on the
    CPU, for S sites. Called by `Shards` at each optimizer step, after the probes were reduced.
    Runs: global. None: there are no statistics of sites."""
    observes_until: int | None = None
    """Step that ends the decisions: the first decision at this step or later is the last one, and
    the memory of the statistics is freed after it. None: decisions go on to the end of the run."""

    decides_at: Callable[[int], bool] = lambda step: False
    """Function (step) -> True if a decision is due at this step. A decision at step 0, before
    training, sets the live entries and the computed components at the start. Called by `Shards` at
    each step. Runs: global."""
    decide: Callable[[int, Scores], Decision] = decide_nothing
    """Function (step, scores) -> decision. Called by `Shards` between backward and the optimizer
    step. Runs: global. The methods of ``scores`` are its only way to use what other ranks hold.
    Their results agree on all ranks, so all ranks decide alike without a broadcast."""

    rewriting: Rewriting | None = None
    """Rewriting of whole tensors at some steps. None: only optimizer steps and decisions change a
    site. A method has a rewriting or decisions, not both, because the metrics of a step have room
    for the values of one."""

    redraws: bool = True
    """True: a resumed run may have another number of steps, and the schedule is computed anew for
    it. False: a resumed run must keep the number of steps and the method's options until the last
    decision has been made (see ``observes_until``)."""
    newborn_warmup: int | None = None
    """Number of steps in which the learning rate of an entry that becomes live during the run rises
    from 0. None: --warmup_steps."""
    newborn_restarts: bool = False
    """True: an entry that becomes live during the run has a whole learning-rate schedule of its
    own, with warm-up and decay, in the steps that are left. False: its learning rate is that of the
    run, multiplied by a ramp from 0 to 1 over the first ``newborn_warmup`` steps."""
    stages: tuple[int, ...] = ()
    """Last step of each stage, ascending. A stage is a part of the run with its own learning-rate
    schedule, its own checkpoint and its own JSON line in ``stages.jsonl``. Empty: the run has no
    stages."""
    stage_rate: Literal["own", "first"] = "own"
    """Stages that train at a learning rate above 0: all, each with its own schedule ("own"), or
    only the first, with rate 0 in the later ones ("first")."""
    stage_resets_moments: bool = False
    """True: Adam's moments are reset at the start of each stage."""

    def __post_init__(self) -> None:
        assert self.rewriting is None or self.decide is decide_nothing, self.name


@dataclass(frozen=True, kw_only=True)
class NoOptions:
    """Options of a method that has no options."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MethodFactory:
    """Entry of a method in `METHODS`: its options, the function that builds it, and texts about it.

    ``docs/generate_methods.py`` writes the documentation page of a method from its module docstring
    and this record.
    """

    options: type[Any]
    """Frozen dataclass of the method's options. Each field becomes a command-line flag of the same
    name, so its name starts with the method's name. Its ``__post_init__`` raises ``ValueError`` for
    bad values."""
    build: Callable[[Any, RunContext], Method]
    """Function (options, context) -> method. It raises ``ValueError`` if the options do not fit the
    run. Called by the training program, the planner and exports. Runs: global."""
    summary: str
    """What the method does, as a phrase of a few words for --help and tables."""
    example: str = ""
    """Flags of a short example run (6 steps of a small model), shown on the documentation page."""
    totals: tuple[str, ...] = ()
    """Names of the options that count something over all linears of the model, such as a budget.
    The planner, which simulates a few linears, gives these their share of it."""


def trained_specs(method: Method, sites: Sequence[Site]) -> dict[str, TensorSpec]:
    """Return the spec of every trained tensor of the run, in the model's order.

    Args:
        method: The method of the run.
        sites: Linears that carry an adapter, in the model's order.

    Returns:
        {"site.tensor": spec}. A tensor that all sites share has one entry, under the first site.
    """
    found: dict[str, TensorSpec] = {}
    for site in sites:
        for key, spec in method.form(site).tensors.items():
            if not spec.shared or site is sites[0]:
                found[f"{site.name}.{key}"] = spec
    return found


def site_names(scores: Scores) -> Sequence[str]:
    """Return the names of the sites that have scored tensors, in the model's order."""
    return list(dict.fromkeys(name.rpartition(".")[0] for name in scores.shapes))


def as_preset(options: Any, preset: str, presets: Mapping[str, Mapping[str, Any]]) -> Any:
    """Return a copy of ``options`` in which fields that are None or empty have the preset's value.

    Args:
        options: Options of a method, an instance of its dataclass.
        preset: Name of the preset, e.g. "released".
        presets: Preset name -> {field name: value}.
    """
    given = {f.name: getattr(options, f.name) for f in fields(options)}
    filled = copy(options)
    for name, value in presets[preset].items():
        if given[name] in (None, ()):
            # Not ``replace``, which would run ``__post_init__`` from within ``__post_init__``.
            object.__setattr__(filled, name, value)
    return filled
