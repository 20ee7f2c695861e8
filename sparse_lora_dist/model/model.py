"""``Model``: the frozen base, sharded by ZeRO-3, with adapters and with modules trained in full."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from sparse_lora_dist.adapter.dropout import RowSeeds
from sparse_lora_dist.adapter.inject import inject
from sparse_lora_dist.adapter.linear import AdapterLinear
from sparse_lora_dist.adapter.peft_agrees import dropped_by_peft, taken_by_peft
from sparse_lora_dist.adapter.peft_read import read_peft
from sparse_lora_dist.base_model.architecture import (
    PRECISIONS,
    left_out,
    meta_model,
    output_head,
    refuse_experts,
)
from sparse_lora_dist.base_model.buffers import fill_buffers, move_buffers
from sparse_lora_dist.base_model.cache.lookup import BaseCache, find_cache
from sparse_lora_dist.base_model.cache.writer import write_cache
from sparse_lora_dist.base_model.safetensors_reader import CheckpointFiles
from sparse_lora_dist.base_model.same_on_all_nodes import Fingerprint
from sparse_lora_dist.base_model.shard_loader import ShardLoader
from sparse_lora_dist.base_model.unread_tensors import in_words, unread_tensors
from sparse_lora_dist.base_model.weight_map import (
    Keys,
    Sources,
    find_keys,
    find_sources,
    is_quantized,
    names_of_today,
)
from sparse_lora_dist.config.config import Config
from sparse_lora_dist.config.paths import resolve_default
from sparse_lora_dist.config.sections import ModelConfig
from sparse_lora_dist.distributed.console import print_line
from sparse_lora_dist.distributed.phases import fail_together, first_on_its_node
from sparse_lora_dist.errors import as_user_error
from sparse_lora_dist.methods import Method
from sparse_lora_dist.methods.protocol.form import Site, TensorSpec, zeros
from sparse_lora_dist.methods.protocol.method import trained_specs
from sparse_lora_dist.model.base_files import (
    DOWNLOAD,
    check_checkpointing,
    check_quantization,
    open_files,
    refuse_tied_linears,
)
from sparse_lora_dist.model.loaded import print_loaded
from sparse_lora_dist.model.look import (
    Look,
    look_together,
    not_run,
    refuse_changing_weights,
    refuse_no_embedding,
    refuse_positions_after_padding,
    refuse_seeing_ahead,
)
from sparse_lora_dist.model.saved_class import SavedClass, by_our_names, find_saved_class
from sparse_lora_dist.model.targets import find_full, find_sites, refuse_packed
from sparse_lora_dist.tasks import TASKS
from sparse_lora_dist.tasks.class_head import Head, classes_of, first_values, modules_inside
from sparse_lora_dist.tasks.loss_head import install
from sparse_lora_dist.zero3.parameters import ShardBuilder
from sparse_lora_dist.zero3.slices import Values


@dataclass(kw_only=True)
class Model:
    """The model of a run: frozen base, adapters, and modules that train in full.

    ``open`` builds it on the meta device, without weights. ``load`` reads this rank's shards of the
    weights and adds the adapters.
    """

    module: PreTrainedModel
    """The transformers model, on the meta device until ``load``."""
    folder: Path
    """Local folder with the base's files."""
    files: CheckpointFiles
    """The base's safetensors files."""
    sources: Sources
    """Name of a parameter of ``module`` -> the tensors of ``files`` that its values come from."""
    name: str
    """Name of the base as the user gave it: a hub id, or the folder."""
    sites: list[Site]
    """Linears that get an adapter, in the model's order."""
    head: Head
    """Modules of a classifier that turn hidden states into class logits, and train in full. For a
    causal language model, whose output head is frozen, a ``Head`` without modules."""
    full: dict[str, nn.Module]
    """Name -> module that trains in full, including those of ``head``. Such a module may contain
    submodules."""
    fingerprint: Fingerprint | None = None
    """Hashes of the base's contents, taken by ``open``: the files may be gone or changed later."""
    saved_class: SavedClass | None = None
    """Class that config.json names, if ``module`` is of another one."""
    look: Look = field(default_factory=Look)
    """What is known of the architecture before its weights are read."""
    as_before: bool = False
    """True if the run began before architectures were looked at: it goes on as it was, whatever
    ``look`` says."""
    cache: BaseCache | None = None
    """Cache of the 4-bit base on disk (--base_cache); if it does not exist yet, ``load`` writes it.
    None: the run uses no cache."""
    left_out: list[str] = field(default_factory=list)
    """Sentences about what config.json asks of training that a run leaves out."""
    adapters: list[AdapterLinear] = field(default_factory=list)
    """Adapters in the order of ``sites``. Empty until ``load``."""
    builder: ShardBuilder | None = None
    """Builder of the sharded parameters. None until ``load``."""

    @classmethod
    def open(cls, config: Config, *, as_before: bool = False, all_sites: bool = False) -> "Model":
        """Build the base model on the meta device and check the options against it. Collective.

        No weights are read. The base is downloaded if it is not on this node's disk.

        Args:
            config: configuration of the run.
            as_before: True for a run that began before architectures were looked at.
            all_sites: True to take every linear that --target_modules names as a site, also one
                that a text does not run.

        Returns:
            The model, without weights and adapters until ``load`` is called.

        Raises:
            UserError: on all ranks, if the base cannot be used or does not fit the options.
        """
        options = config.model
        source = f"--model {options.model}"
        folder, architecture, files, fingerprint = open_files(options, source)
        task, without = TASKS[options.task], left_out(architecture)
        labels = as_user_error(f"--data {config.data.data}", "Check its labels, or convert them.")
        with fail_together("reading the labels"), first_on_its_node(), labels:
            task.settle(architecture, config.data)
        with fail_together("opening the base model"), as_user_error(source, DOWNLOAD):
            module = meta_model(
                architecture,
                task=options.task,
                dtype=PRECISIONS[options.precision],
                attn_implementation=options.attention_of_transformers,
                trust_remote_code=options.trust_remote_code,
            )
            refuse_experts(module)
            check_checkpointing(options, module)
        look = look_together(module, options.task)
        with fail_together("opening the base model"), as_user_error(source, DOWNLOAD):
            applied = Look() if as_before else look
            refuse_no_embedding(module)
            refuse_changing_weights(module, applied)
            refuse_seeing_ahead(module, applied)
            keys_of = find_keys(module, files)
            saved_class = None
            if options.task == "causal_lm":
                refuse_positions_after_padding(module, as_before=as_before)
                saved_class = find_saved_class(module, architecture, files, keys_of)
            wanted = by_our_names(config.adapter, saved_class)
            head = task.head(module, files, keys_of)
            full = {**head.modules, **find_full(module, wanted.modules_to_save, head)}
            barred = Look() if all_sites else applied
            sites, notes = find_sites(module, wanted, modules_inside(full), barred)
            sources = find_sources(module, files, keys_of, new=head.new)
            fill_buffers(module, stored=sources)
            check_quantization(options, architecture, files)
            refuse_tied_linears(options, module)
            refuse_packed(files, sources, applied)
        _note_unread(module, files, keys_of, task.trains_head)
        for note in notes + not_run(full, applied):
            print_line("note", note)
        hub = folder != Path(resolve_default("model", options.model))
        model = cls(
            module=module,
            folder=folder,
            files=files,
            sources=sources,
            name=options.model if hub else str(folder),
            sites=sites,
            head=head,
            full=full,
            fingerprint=fingerprint,
            saved_class=saved_class,
            look=look,
            as_before=as_before,
            left_out=without,
        )
        model._find_cache(options)
        return model

    @property
    def dropped_by_peft(self) -> list[str]:
        """Last names of linears whose LoRA the installed PEFT does not apply."""
        return dropped_by_peft(self.module, [site.name for site in self.sites])

    @property
    def taken_by_peft(self) -> list[str]:
        """Names of modules that the installed PEFT takes for modules trained in full."""
        return taken_by_peft(self.module, self.full, "SEQ_CLS" if self.head.modules else "")

    def _find_cache(self, options: ModelConfig) -> None:
        """Set ``cache`` if --base_cache is given and the base is not in 4 bits already.

        Collective if --base_cache is given.
        """
        if options.base_cache is None:
            return
        if is_quantized(self.files):
            print_line("note", f"--base_cache is not needed: {options.model} is already in 4 bits")
            return
        self.cache = find_cache(
            Path(options.base_cache),
            self.name,
            self.folder,
            self.files,
            self.module,
            keep={*self._not_quantized(), *modules_inside(self.full)},
            new=self.head.new,
            double_quant=options.double_quant,
        )

    def _not_quantized(self) -> set[str]:
        head = output_head(self.module)
        return {*self.whole} | ({head} if head else set())

    def load(
        self,
        config: Config,
        method: Method,
        engine_config: dict[str, Any],
        given: Mapping[str, Values] | None = None,
        *,
        restored: bool = False,
    ) -> RowSeeds:
        """Read this rank's shards of the base and add the adapters. Collective.

        Writes the cache of the 4-bit base if --base_cache is given and it does not exist yet.

        Args:
            config: configuration of the run.
            method: sparse method of the run.
            engine_config: DeepSpeed configuration, as a dict.
            given: tensor name -> function that returns a range of the tensor's initial values,
                which replace the usual ones. A tensor of an adapter is named "site.tensor", where
                "site" is the linear's name in the base; others have the parameter's name.
            restored: True if a checkpoint is restored afterwards, which holds every trained tensor:
                --init_adapter is not read.

        Returns:
            Source of the adapters' dropout masks. Its ``begin`` must be called before each
            micro-batch.
        """
        adapter = config.adapter
        seeds = RowSeeds(seed=config.train.seed, sequence_length=config.data.sequence_length)
        adapted = {} if restored else self._first_adapter(config, method)
        drawn = first_values(self.module, self.head.new, config.train.seed)
        initial = {**drawn, **(given or {}), **adapted}
        self.builder = builder = ShardBuilder(engine_config, PRECISIONS[config.model.precision])
        move_buffers(self.module, builder.device)
        files, sources, cache = self.files, self.sources, self.cache
        if cache is not None and cache.files is not None:
            files, sources = cache.files, cache.sources
        loader = ShardLoader(
            files,
            sources,
            builder,
            # Linears in floats are not quantised if the base files are in 4 bits already: whoever
            # made the files left them in floats on purpose.
            quantize=config.model.quantization == "nf4" and not is_quantized(files),
            double_quant=config.model.double_quant,
            initial=initial,
        )
        train = modules_inside(self.full)
        loader.load(self.module, keep=self._not_quantized(), train=train)
        if cache is not None and cache.files is None:
            write_cache(cache, self.module, self.folder, self.files, self.sources)
        self.adapters = inject(
            self.module,
            self.sites,
            method,
            builder,
            seeds,
            alpha=adapter.alpha,
            dropout=adapter.dropout,
            micro_batches=config.train.gradient_accumulation_steps,
            initial=initial,
        )
        install(self.module)
        self.full = {name: self.module.get_submodule(name) for name in self.full}
        if config.model.gradient_checkpointing:
            self.module.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": False}
            )
        given_to = self.head.parameters() if restored else adapted
        source = "the checkpoint" if restored else "--init_adapter"
        print_loaded(
            self.folder,
            loader.report,
            head=self.head.report(len(self.classes), given_to, source),
            trained=[parameter.ds_numel for parameter in self.trainable()],  # type: ignore[attr-defined]
            num_adapters=len(self.adapters),
        )
        return seeds

    def _first_adapter(self, config: Config, method: Method) -> dict[str, Values]:
        """Return initial values from --init_adapter, by tensor name; {} without it. Collective."""
        adapter = config.adapter
        with fail_together("reading --init_adapter"):
            if adapter.init_adapter is None:
                return {}
            return read_peft(
                adapter.init_adapter,
                self.trained_shapes(method),
                rank=adapter.rank,
                alpha=adapter.alpha,
                our_name=self.our_name,
                task_type=TASKS[config.model.task].peft_type,
                classes=self.head.rows(self.classes),
            )

    def trained_shapes(self, method: Method) -> dict[str, tuple[int, ...]]:
        """Return the shape of every tensor that the method trains in this model.

        Args:
            method: sparse method of the run.

        Returns:
            Tensor name -> shape. A tensor of an adapter is named "site.tensor", where "site" is the
            linear's name in the base; others have the parameter's name.
        """
        shapes = {name: spec.shape for name, spec in trained_specs(method, self.sites).items()}
        for name, module in self.full.items():
            shapes |= {f"{name}.{k}": tuple(p.shape) for k, p in module.named_parameters()}
        return shapes

    def trainable(self) -> list[nn.Parameter]:
        """Return all parameters that the optimizer steps, in the model's order."""
        return [p for p in self.module.parameters() if p.requires_grad]

    def param_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Return the trained parameters as param groups for ``SparseAdamW``.

        The parameters of a group share learning-rate factor, weight decay and projection.

        Args:
            weight_decay: weight decay of the run. Tensors that the method exempts from it are in
                groups with 0.

        Returns:
            One dict per group. "params": list of parameters. "lr_factor": number that multiplies
            the learning rate. "weight_decay": that of the group. "project": function that
            ``SparseAdamW`` calls at the end of each update, or None.
        """
        usual = TensorSpec(shape=(), init=zeros)
        special = {
            id(getattr(a, name)): spec for a in self.adapters for name, spec in a.specs.items()
        }
        groups: dict[Any, dict[str, Any]] = {}
        for parameter in self.trainable():
            spec = special.get(id(parameter), usual)
            group = groups.setdefault(
                (spec.lr_factor, spec.decays, spec.project),
                {
                    "params": [],
                    "lr_factor": spec.lr_factor,
                    "weight_decay": weight_decay if spec.decays else 0.0,
                    "project": spec.project,
                },
            )
            group["params"].append(parameter)
        return list(groups.values())

    def our_name(self, name: str) -> str:
        """Return the name in ``module`` of a linear or of a tensor of one that is named as in the
        class of config.json, or as in an older transformers; others are returned as they are."""
        name = name if self.saved_class is None else self.saved_class.ours_of(name)
        owner, dot, last = name.rpartition(".")
        whole = self._today(name)
        return whole if whole != name else f"{self._today(owner)}{dot}{last}"

    @cached_property
    def _today(self) -> Callable[[str], str]:
        return names_of_today(self.module)

    @property
    def whole(self) -> frozenset[str]:
        """Names of linears whose weight the model uses by itself, so that they stay as they are."""
        return frozenset() if self.as_before else self.look.read

    @property
    def classes(self) -> list[str]:
        """Class names of a classifier, in the order of its logits; empty for other models."""
        return classes_of(self.module.config) if self.head.modules else []

    @property
    def identity(self) -> str:
        """Hash of config.json and of the names, sizes and headers of the base's files."""
        assert self.fingerprint is not None
        return self.fingerprint.headers


def _note_unread(
    module: PreTrainedModel, files: CheckpointFiles, keys_of: Keys, new_head: bool
) -> None:
    for said in in_words(*unread_tensors(module, files, keys_of, new_head=new_head)):
        print_line("note", said)
