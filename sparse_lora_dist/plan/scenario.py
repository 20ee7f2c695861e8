"""Inputs of a plan: the memory settings of the engine file (the DeepSpeed JSON file), the number of
ranks and machines, and the model on the meta device with the options of the run."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import torch
from transformers import LlamaForCausalLM, PreTrainedModel

from sparse_lora_dist.base_model.architecture import PRECISIONS, output_head
from sparse_lora_dist.config.config import Config
from sparse_lora_dist.config.deepspeed_file import value_at
from sparse_lora_dist.config.sections import VARLEN, AdapterConfig
from sparse_lora_dist.errors import UserError
from sparse_lora_dist.methods import METHODS, Method, RunContext
from sparse_lora_dist.methods.protocol.form import Site
from sparse_lora_dist.model.targets import find_sites
from sparse_lora_dist.plan.forecast import Forecast, forecast
from sparse_lora_dist.plan.playback.gathers import Bounds, Gathered, gathered
from sparse_lora_dist.plan.playback.llama_sizes import as_llama
from sparse_lora_dist.plan.playback.meta_step import StepMemory, step_memory
from sparse_lora_dist.plan.playback.parameters import (
    FILE_ITEMSIZE,
    PlannedParameter,
    SavedQuantization,
    planned_parameters,
    ties,
)
from sparse_lora_dist.zero3.layers import layers_of

STEPS = 1000
"""Optimizer steps of the run that are assumed if ``--max_steps`` is not given."""


NOT_PLAYED = {
    "stage3_module_granularity_threshold": 0,
    "stage3_model_persistence_threshold": sys.maxsize,
}
"""Key of an engine file that the plan ignores although it changes what is gathered -> DeepSpeed's
default."""


@dataclass(frozen=True, kw_only=True)
class PlannedEngine:
    """Settings of an engine file that change the memory; the defaults are DeepSpeed's."""

    bounds: Bounds
    """Limits on gathered parameters."""
    reduce_bucket: int = 500_000_000
    """reduce_bucket_size: number of elements of the bucket that gradients are reduced in."""
    hpz: int = 1
    """zero_hpz_partition_size: number of ranks that share a second copy of the parameters (ZeRO++
    hpZ). 1: there is no second copy."""
    parameters: Literal["none", "cpu", "nvme"] = "none"
    """Device that parameters are offloaded to."""
    optimizer: Literal["none", "cpu"] = "none"
    """Device that the optimizer state is offloaded to."""
    nvme_buffers: int = 0
    """Number of elements of the pinned buffers through which parameters are read from disk."""
    nvme_from: int = 2**20
    """Size in bytes of the smallest shard that is offloaded to disk; DeepSpeed keeps smaller shards
    in host memory."""
    pinned: bool = False
    """True if offloaded parameters are in pinned memory. It has no effect without a GPU."""
    settles_ranks: bool = False
    """True if the file sets train_batch_size, which allows only one number of ranks."""
    not_played: tuple[str, ...] = ()
    """Keys of ``NOT_PLAYED`` that the file sets to other values than the defaults."""

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> "PlannedEngine":
        """Return the settings of an engine file; ``content`` is its checked JSON content."""

        def number(key: str, default: int) -> int:
            value = value_at(content, f"zero_optimization.{key}")
            return default if value is None else int(value)

        param = value_at(content, "zero_optimization.offload_param") or {}
        optimizer = value_at(content, "zero_optimization.offload_optimizer") or {}
        buffers = int(param.get("buffer_count", 5)) * int(param.get("buffer_size", 100_000_000))
        usual = Bounds()
        return cls(
            bounds=Bounds(
                prefetch=number("stage3_prefetch_bucket_size", usual.prefetch),
                live=number("stage3_max_live_parameters", usual.live),
                reuse=number("stage3_max_reuse_distance", usual.reuse),
                persistent=number("stage3_param_persistence_threshold", usual.persistent),
                one_by_one=bool(number("stage3_allgather_sequential", 0)),
                by_layer=param.get("device") != "nvme",
            ),
            reduce_bucket=number("reduce_bucket_size", cls.reduce_bucket),
            hpz=max(1, number("zero_hpz_partition_size", 1)),
            parameters=param.get("device", "none"),
            optimizer=optimizer.get("device", "none"),
            nvme_buffers=buffers if param.get("device") == "nvme" else 0,
            nvme_from=max(cls.nvme_from, int(value_at(content, "aio.block_size") or 0)),
            pinned=bool(param.get("pin_memory", False)),
            not_played=tuple(k for k, usual in NOT_PLAYED.items() if number(k, usual) != usual),
            settles_ranks=content.get("train_batch_size", "auto") != "auto",
        )


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """The ranks of a job and the machines they are on."""

    world_size: int
    """Number of ranks on all machines together."""
    nodes: int = 1
    """Number of machines."""
    on_gpu: bool = True
    """True if every rank has a GPU of its own, False if all ranks run on CPUs."""

    @property
    def per_node(self) -> int:
        """Largest number of ranks on one machine."""
        return -(-self.world_size // self.nodes)


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """A model on the meta device, its adapters, and the options of the run: all that a plan needs
    except the engine file and the ranks.

    The properties are computed from the shapes of the model's parameters and the options. Most are
    computed once, when they are first read.
    """

    model: PreTrainedModel
    """The model on the meta device, without adapters."""
    sites: tuple[Site, ...]
    """Linears that carry adapters."""
    trained: tuple[str, ...]
    """Names of modules trained in full."""
    config: Config
    """All options of the run."""
    whole: frozenset[str] = frozenset()
    """Names of linears that are not quantised, besides the output head."""
    whole_logits: bool = False
    """True if the logits of all tokens are computed at once, False if in chunks of tokens."""
    file_itemsize: int = FILE_ITEMSIZE
    """Bytes per weight in base files that hold floats."""
    notes: list[str] = field(default_factory=list)
    """Sentences for the user that say where the plan takes a Llama in place of the model. Reading
    the property ``step`` may append one."""
    _gathered: dict[Bounds, Gathered] = field(default_factory=dict, repr=False, compare=False)

    def with_config(self, config: Config, **others: Any) -> "Shapes":
        """Return the shapes of a run with the same model and other options.

        Args:
            config: all options of the other run.
            others: new values of other fields of ``Shapes``, by name, such as ``whole_logits``.
        """
        return replace(self, config=config, _gathered={}, **others)

    @property
    def itemsize(self) -> int:
        """Bytes per element of ``dtype``."""
        return self.dtype.itemsize

    @property
    def dtype(self) -> torch.dtype:
        """Dtype that DeepSpeed holds the parameters in, from ``--precision``."""
        return PRECISIONS[self.config.model.precision]

    @cached_property
    def run_context(self) -> RunContext:
        """Facts of the run that methods are built from: steps, warm-up, learning rate, sites."""
        return self.config.run_context(self.config.train.max_steps or STEPS, self.sites)

    @cached_property
    def method(self) -> Method:
        """The method of the run, built for its steps and sites.

        Raises:
            UserError: if the method's schedule does not fit into the run's steps.
        """
        name = self.config.adapter.method
        try:
            return METHODS[name].build(self.config.method_options, self.run_context)
        except ValueError as error:
            assumed = self.config.train.max_steps is None
            hint = (
                f" (The plan assumes {STEPS} steps because --max_steps is not given. Set it.)"
                if assumed
                else ""
            )
            raise UserError(f"--method {name}: {error}{hint}") from error

    @cached_property
    def parameters(self) -> list[PlannedParameter]:
        """All ZeRO-3 parameters of the run, in the model's order."""
        return planned_parameters(
            self.model,
            self.sites,
            self.method,
            self.trained,
            self.whole,
            quantize=self.config.model.quantization == "nf4",
            double_quant=self.config.model.double_quant,
            dtype=self.dtype,
            saved=self.saved,
            file_itemsize=self.file_itemsize,
        )

    @property
    def saved(self) -> SavedQuantization | None:
        """The quantisation of the base files; None if they hold floats."""
        return SavedQuantization.of(self.model.config)

    @cached_property
    def forecast(self) -> Forecast:
        """Which adapter entries are live (stepped by the optimizer, with moments) at the start and
        after each decision, from a simulation of the method's decisions."""
        factory = METHODS[self.config.adapter.method]
        return forecast(factory, self.config.method_options, self.run_context)

    @cached_property
    def step(self) -> StepMemory:
        """Memory of activations and temporaries of one micro-batch on one rank.

        If the model cannot run on the meta device, a Llama of the same sizes is run in its place,
        and a note is appended to ``notes``.

        Raises:
            UserError: if the model cannot run and its config lacks the sizes of a Llama.
        """
        try:
            return self._played(self.model, self.sites)
        except Exception as error:  # a model that reads values of tensors may raise anything
            first = str(error).partition("\n")[0]
            problem = f"{self.model.config.model_type} cannot run on the meta device ({first})"
        sizes = as_llama(self.model.config.get_text_config(), problem)
        note = f"{problem}, so its activations are planned as those of a Llama of the same sizes"
        if note not in self.notes:  # the list is shared by ``with_config``
            self.notes.append(note)
        with torch.device("meta"):
            model = LlamaForCausalLM._from_config(sizes, dtype=self.dtype)
        if self.model.config.get_text_config()._attn_implementation == VARLEN:
            model.set_attn_implementation(VARLEN)
        return self._played(model, find_sites(model, AdapterConfig(rank=1), ())[0])

    def _played(self, model: PreTrainedModel, sites: Sequence[Site]) -> StepMemory:
        config = self.config
        return step_memory(
            model,
            sites,
            self.method,
            rows=config.train.micro_batch_size,
            tokens=config.data.sequence_length,
            trained=self.trained,
            checkpointing=config.model.gradient_checkpointing,
            dropout=config.adapter.dropout,
            packed=config.packs,
        )

    def gathered(self, bounds: Bounds) -> Gathered:
        """Return how many elements one micro-batch gathers on one rank; the results are cached.

        Args:
            bounds: limits of an engine file on gathered parameters.
        """
        if bounds not in self._gathered:
            self._gathered[bounds] = gathered(
                self.parameters,
                layers_of(self.model)[0],
                bounds,
                once=self._without_backward(),
                ties=ties(self.model),
                checkpointing=self.config.model.gradient_checkpointing,
            )
        return self._gathered[bounds]

    def _without_backward(self) -> set[str]:
        """Return the names of modules that are not gathered for backward.

        These are the embeddings, because no gradient is needed before them, and the output head,
        unless it trains: a loss in chunks computes the gradient of its input during forward.
        """
        first = {p.module for p in self.parameters if p.kind == "embeddings"}
        head = None if self.whole_logits else output_head(self.model)
        return first if head is None or head in self.trained else first | {head}
