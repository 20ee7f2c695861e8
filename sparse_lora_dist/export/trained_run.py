"""Reads the adapter of a checkpoint, in one process and without the base model or DeepSpeed.

A "site" is a linear with an adapter (PEFT: target module). The tensors of one site are read at a
time.

Shapes: L number of rank-1 components with a nonzero update, I in_features, O out_features.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparse_lora_dist import checkpoint
from sparse_lora_dist.adapter.dropout import RowSeeds
from sparse_lora_dist.adapter.linear import AdapterLinear
from sparse_lora_dist.base_model.architecture import PRECISIONS
from sparse_lora_dist.base_model.frozen_linear import FrozenLinear
from sparse_lora_dist.checkpoint import SavedSlices
from sparse_lora_dist.config.config import Config
from sparse_lora_dist.config.load import saved_config
from sparse_lora_dist.config.paths import real_path
from sparse_lora_dist.distributed.console import print_line
from sparse_lora_dist.errors import UserError
from sparse_lora_dist.export.peft_adapter import Pair, PlainLora, live_pair, no_update
from sparse_lora_dist.export.peft_own_type import OwnType
from sparse_lora_dist.export.weight_change import LowRank, WeightChange, dense_change
from sparse_lora_dist.methods import METHODS, Method
from sparse_lora_dist.methods.protocol.form import Site
from sparse_lora_dist.methods.protocol.method import Components
from sparse_lora_dist.model.prompting import Prompting
from sparse_lora_dist.model.saved_class import SavedClass
from sparse_lora_dist.tasks import TASKS


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A checkpoint of a run: the trained tensors, and the settings of the run.

    None of its methods is collective. Tensors are read from the files at each call.
    """

    path: Path
    """Folder of the checkpoint."""
    manifest: Mapping[str, Any]
    """Content of its manifest.json."""
    config: Config
    """Options of the run."""
    slices: SavedSlices
    """Reader of the saved tensors."""
    read_base: Callable[[Site], Tensor] | None = None
    """Function that returns the base weight of a site as the run computed with it.

    The weight is [out_features, in_features], dequantised if the run held it in 4 bits. None: the
    base was not opened.
    """

    @classmethod
    def open(cls, source: Path) -> "Trained":
        """Open the newest intact checkpoint of a run, or one checkpoint.

        Args:
            source: A run folder, or the folder of one checkpoint.

        Returns:
            The opened checkpoint. No tensors are read yet.

        Raises:
            UserError: There is no checkpoint, or it is damaged.
        """
        return cls.at(_checkpoint_in(real_path("RUN", source)))

    @classmethod
    def at(cls, path: Path) -> "Trained":
        """Open the checkpoint in folder ``path``, without checking its files for damage."""
        manifest = checkpoint.read_manifest(path)
        return cls(
            path=path,
            manifest=manifest,
            config=saved_config(manifest["config"]),
            slices=SavedSlices.of(path, manifest),
        )

    @property
    def base(self) -> str:
        """Hub id or folder of the base, as the run named it."""
        return str(self.manifest["base"])

    @property
    def classes(self) -> Sequence[str]:
        """Class names of a classifier; empty for a language model."""
        return self.manifest["description"].get("classes", ())  # type: ignore[no-any-return]

    @property
    def prompting(self) -> Prompting | None:
        """How the model is prompted and where its answers end; None for a classifier, a run that
        edits facts, and a checkpoint of a version that did not store it."""
        stored = self.manifest.get("prompting")
        return None if stored is None else Prompting(**stored)

    @property
    def saved_class(self) -> SavedClass | None:
        """Class that the base's config.json names, if the run's model is of another one."""
        stored = self.manifest.get("saved_class")
        return None if stored is None else SavedClass(**stored)

    @property
    def step(self) -> int:
        """Optimizer step after which the checkpoint was saved."""
        return int(self.manifest["progress"]["step"])

    @cached_property
    def sites(self) -> tuple[Site, ...]:
        """The sites of the run, in the model's order."""
        shapes = self.manifest["sites"]["shapes"].items()
        return tuple(
            Site(name=name, in_features=i, out_features=o, rank=r) for name, (i, o, r) in shapes
        )

    @cached_property
    def method(self) -> Method:
        """The run's method, with the run's settings."""
        context = self.config.run_context(self.manifest["total_steps"], self.sites)
        return METHODS[self.config.adapter.method].build(self.config.method_options, context)

    @property
    def scale(self) -> float:
        """Scale of the factors (A, B) that ``pair`` returns: delta W = scale * B A.

        It is alpha / --rank, whatever scale the method uses in training.
        """
        return self.config.adapter.alpha / self.config.adapter.rank

    def pair(self, site: Site, dtype: torch.dtype = torch.float32) -> Pair | None:
        """Return the update of a site's weight as the factors of a plain LoRA.

        Args:
            site: One of ``sites``.
            dtype: Dtype that the fp32 master weights are rounded to first.

        Returns:
            (A [L, I], B [O, L]) with delta W = ``self.scale`` * B A, of the L components with a
            nonzero update; None if L is 0.

        Raises:
            NoPair: The method's update is not a low-rank product.
        """
        adapter, tensors = self._adapter(site, dtype)
        with torch.no_grad():
            return live_pair(adapter, tensors)

    def change(self, site: Site) -> WeightChange | None:
        """Return the update of a site's weight, computed in fp32 from the fp32 master weights.

        Args:
            site: One of ``sites``.

        Returns:
            The update, low-rank if the method's update is a LoRA, else dense; None if it is zero.

        Raises:
            UserError: The update depends on the base's weights, and ``read_base`` is None.
        """
        adapter, tensors = self._adapter(site, torch.float32)
        with torch.no_grad():
            if adapter.form.to_lora is None:
                dense = dense_change(adapter, adapter.computed(tensors))
                return dense if dense.max_changed else None
            pair = live_pair(adapter, tensors)
        return LowRank(a_LI=pair[0], b_OL=pair[1], scale=self.scale) if pair else None

    def changes(self) -> Iterator[tuple[Site, WeightChange]]:
        """Yield (site, update) for every site with a nonzero update, reading one at a time."""
        for site in self.sites:
            if change := self.change(site):
                yield site, change

    @property
    def is_lora(self) -> bool:
        """True if the update of every site is a LoRA."""
        return all(self.method.form(site).to_lora is not None for site in self.sites)

    @property
    def reads_base(self) -> bool:
        """True if the update depends on the base's weights."""
        return any(self.method.form(site).reads_base for site in self.sites)

    @property
    def masks_base(self) -> bool:
        """True if the method sets weights of the base to zero."""
        return any(self.method.form(site).masks_base for site in self.sites)

    def _base_linear(self, site: Site) -> nn.Module:
        """Return a site's frozen linear; ``nn.Identity()`` if the update does not depend on it."""
        if not self.method.form(site).reads_base:
            return nn.Identity()  # never called
        if self.read_base is None:
            raise UserError(
                f"The update of --method {self.method.name} depends on the base's weights, which "
                "were not opened. Export the run with launcher/export.py, which opens them."
            )
        weight = nn.Parameter(self.read_base(site), requires_grad=False)
        return FrozenLinear(site.in_features, site.out_features, weight, None)

    def _adapter(self, site: Site, dtype: torch.dtype) -> tuple[AdapterLinear, list[nn.Parameter]]:
        """Build the adapter of a site from the checkpoint.

        Args:
            site: One of ``sites``.
            dtype: Dtype that the fp32 master weights are rounded to.

        Returns:
            (adapter, its trained tensors in the order of ``adapter.specs``).
        """
        form = self.method.form(site)
        tensors = form.tensors
        named = {}
        for key, spec in tensors.items():
            owner = self.sites[0] if spec.shared else site
            named[key] = self.tensor(f"{owner.name}.{key}").to(dtype)
        for key, kept in form.kept.items():
            named[key] = self.slices.entries("kept", f"{site.name}.{key}", 0, kept.num_bytes)
        adapter = AdapterLinear(
            self._base_linear(site),  # type: ignore[arg-type]
            site,
            self.method,
            {key: nn.Parameter(t, requires_grad=False) for key, t in named.items()},
            alpha=self.config.adapter.alpha,
            dropout=0.0,
            row_seeds=RowSeeds(seed=self.config.train.seed, sequence_length=1),
        )
        computed, opened = self.manifest["sites"]["pieces"][site.name]
        adapter.set_components(Components(computed=tuple(computed), open=opened))
        return adapter, [getattr(adapter, key) for key in tensors]

    def own_type(self) -> OwnType | None:
        """Return the adapter as another PEFT type than LoRA, in the precision of the run.

        Returns:
            The whole adapter, in memory; None if PEFT has no type that computes the same update.
        """
        forms = {}
        for site in self.sites:
            if self.method.form(site).to_peft is None:
                return None
            adapter, tensors = self._adapter(site, self.dtype)
            assert adapter.form.to_peft is not None
            with torch.no_grad():
                forms[site.name] = adapter.form.to_peft(adapter.computed(tensors), adapter.scale)
        return OwnType(forms=forms, **self._peft_fields())

    def pairs(self, dtype: torch.dtype = torch.float32) -> Iterator[tuple[Site, Pair]]:
        """Yield (site, the factors (A, B) that ``pair`` returns) for each site with an update.

        Sites whose update is zero are left out.

        Args:
            dtype: Dtype that the fp32 master weights are rounded to first.

        Raises:
            NoPair: The method's update is not a low-rank product.
        """
        for site in self.sites:
            if pair := self.pair(site, dtype):
                yield site, pair

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the run: dtype of the base's weights and of the adapters in forward."""
        return PRECISIONS[self.config.model.precision]

    def tensor(self, name: str) -> Tensor:
        """Return the fp32 master weight of a trained tensor.

        Args:
            name: Name of the tensor: "SITE.lora_a" with the name of a site, or the name of a
                parameter that was trained in full.

        Raises:
            UserError: The tensor holds nan or infinity.
        """
        shape = self.manifest["tensors"][name]
        found = self.slices.entries("master", name, 0, prod(shape)).view(shape)
        if not found.isfinite().all():
            raise UserError(
                f"{name} of {self.path} holds values that are not finite. Export another "
                "checkpoint, or train again from weights that are whole."
            )
        return found

    @cached_property
    def full(self) -> tuple[str, ...]:
        """Names of the parameters of modules trained in full."""
        adapted = tuple(f"{site.name}." for site in self.sites)
        return tuple(name for name in self.manifest["tensors"] if not name.startswith(adapted))

    def plain_lora(self) -> PlainLora:
        """Return the whole adapter as a plain LoRA, in memory, in the precision of the run.

        Raises:
            NoPair: The method's update is not a low-rank product.
        """
        adapter = self.config.adapter
        pairs = {site.name: pair for site, pair in self.pairs(self.dtype)}
        if not pairs and self.full:
            pairs = {self.sites[0].name: no_update(self.sites[0])}
        return PlainLora(
            pairs=pairs,
            rank=adapter.rank,
            alpha=adapter.alpha,
            dropout=adapter.dropout,
            **self._peft_fields(),
        )

    def _peft_fields(self) -> dict[str, Any]:
        """Return field name -> value for the fields of ``PeftAdapter``."""
        return {
            "full": {name: self.tensor(name).to(self.dtype) for name in self.full},
            "full_modules": self.manifest["full_modules"],
            "base": self.base,
            "revision": self.config.model.revision,
            "task_type": TASKS[self.config.model.task].peft_type,
            "classes": self.classes,
            "prompting": self.prompting,
            "saved_class": self.saved_class,
        }


def _checkpoint_in(source: Path) -> Path:
    """Return the folder of the checkpoint to read.

    Args:
        source: Run folder, whose newest intact checkpoint is returned, or folder of a checkpoint,
            which is returned itself.

    Raises:
        UserError: There is no complete checkpoint, or all are damaged.
    """
    if not source.is_dir():
        raise UserError(
            f"{source} is not a folder. Give a run folder, or one of its checkpoints/step_... "
            "folders."
        )
    run = source / "checkpoints"
    found = checkpoint.published(run)[::-1] if run.is_dir() else [source]
    if not found:
        raise UserError(
            f"{source} has no complete checkpoint yet. Train until the first --save_every step, or "
            "until the run ends."
        )
    damages: list[str] = []
    for path in found:
        damage = checkpoint.find_damage(path)
        if damage is None:
            for skipped in damages:
                print_line("skipped", skipped)
            return path
        damages.append(damage)
    raise UserError(
        f"No adapter can be read from {source}. {damages[0]} Or name another checkpoint."
    )
