"""What a checkpoint holds, read one linear at a time by one process, without the model."""

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
from sparse_lora_dist.errors import UserError
from sparse_lora_dist.export.peft_adapter import Pair, PlainLora, live_pair
from sparse_lora_dist.export.peft_own_type import OwnType
from sparse_lora_dist.export.weight_change import Change, LowRank, dense_change
from sparse_lora_dist.methods import METHODS, Method
from sparse_lora_dist.methods.protocol.form import Site
from sparse_lora_dist.methods.protocol.method import Components
from sparse_lora_dist.tasks import TASKS


@dataclass(frozen=True, kw_only=True)
class Trained:
    """The newest whole checkpoint of a run, or the one that was named."""

    path: Path
    manifest: Mapping[str, Any]
    config: Config
    slices: SavedSlices
    read_base: Callable[[Site], Tensor] | None = None
    """w_OI of a site as the run had it; None: nobody has looked for the base."""

    @classmethod
    def open(cls, source: Path) -> "Trained":
        """From a run's folder, or a checkpoint's.

        Raises:
            UserError: there is none, or it is damaged.
        """
        return cls.at(_checkpoint_in(source.resolve()))

    @classmethod
    def at(cls, path: Path) -> "Trained":
        """From a checkpoint that is known to be whole."""
        manifest = checkpoint.read_manifest(path)
        return cls(
            path=path,
            manifest=manifest,
            config=saved_config(manifest["config"]),
            slices=SavedSlices.of(path, manifest),
        )

    @property
    def base(self) -> str:
        """What the run called its base: a hub id, or a folder."""
        return str(self.manifest["base"])

    @property
    def classes(self) -> Sequence[str]:
        """Of a classifier."""
        return self.manifest["description"].get("classes", ())  # type: ignore[no-any-return]

    @property
    def step(self) -> int:
        return int(self.manifest["progress"]["step"])

    @cached_property
    def sites(self) -> tuple[Site, ...]:
        """The adapted linears, in the model's order."""
        shapes = self.manifest["sites"]["shapes"].items()
        return tuple(
            Site(name=name, in_features=i, out_features=o, rank=r) for name, (i, o, r) in shapes
        )

    @cached_property
    def method(self) -> Method:
        """As the run had it."""
        plan = self.config.run_context(self.manifest["total_steps"], self.sites)
        return METHODS[self.config.adapter.method].build(self.config.method_options, plan)

    @property
    def scale(self) -> float:
        """What the product of a pair is multiplied by."""
        return self.config.adapter.alpha / self.config.adapter.rank

    def pair(self, site: Site, dtype: torch.dtype = torch.float32) -> Pair | None:
        """The plain LoRA of a site, of the components that do something, made from its masters as
        ``dtype`` has them; None where none does.

        Raises:
            NoPair: the method's updates are no such.
        """
        adapter, tensors = self._adapter(site, dtype)
        with torch.no_grad():
            return live_pair(adapter, tensors)

    def change(self, site: Site) -> Change | None:
        """What is added to its weight, from its masters; None where that is nothing."""
        adapter, tensors = self._adapter(site, torch.float32)
        with torch.no_grad():
            if adapter.form.to_lora is None:
                dense = dense_change(adapter, adapter.computed(tensors))
                return dense if dense.at_most else None
            pair = live_pair(adapter, tensors)
        return LowRank(a_LI=pair[0], b_OL=pair[1], scale=self.scale) if pair else None

    def changes(self) -> Iterator[tuple[Site, Change]]:
        """(site, its change) of all in which something lives, read as they are asked for."""
        for site in self.sites:
            if change := self.change(site):
                yield site, change

    @property
    def is_lora(self) -> bool:
        """Is what it adds a LoRA everywhere?"""
        return all(self.method.form(site).to_lora is not None for site in self.sites)

    @property
    def reads_base(self) -> bool:
        """Does what it adds depend on the base's weights?"""
        return any(self.method.form(site).reads_base for site in self.sites)

    @property
    def masks_base(self) -> bool:
        """Does it take weights of the base away?"""
        return any(self.method.form(site).masks_base for site in self.sites)

    def _linear(self, site: Site) -> nn.Module:
        """What its adapter lies over."""
        if not self.method.form(site).reads_base:
            return nn.Identity()  # which is not asked
        if self.read_base is None:
            raise UserError(
                f"what --method {self.method.name} adds to a weight depends on the base's: export "
                "it with launcher/export.py, which reads both."
            )
        weight = nn.Parameter(self.read_base(site), requires_grad=False)
        return FrozenLinear(site.in_features, site.out_features, weight, None)

    def _adapter(self, site: Site, dtype: torch.dtype) -> tuple[AdapterLinear, list[nn.Parameter]]:
        """Over a base that computes nothing, with its masters as ``dtype`` has them."""
        form = self.method.form(site)
        tensors = form.tensors
        named = {}
        for key, spec in tensors.items():
            owner = self.sites[0] if spec.shared else site
            named[key] = self.tensor(f"{owner.name}.{key}").to(dtype)
        for key, kept in form.kept.items():
            named[key] = self.slices.entries("kept", f"{site.name}.{key}", 0, kept.num_bytes)
        adapter = AdapterLinear(
            self._linear(site),  # type: ignore[arg-type]
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
        """As forward had it, as a type of PEFT's own; None where PEFT has none that agrees."""
        forms = {}
        for site in self.sites:
            if self.method.form(site).to_peft is None:
                return None
            adapter, tensors = self._adapter(site, self.dtype)
            assert adapter.form.to_peft is not None
            with torch.no_grad():
                forms[site.name] = adapter.form.to_peft(adapter.computed(tensors), adapter.scale)
        return OwnType(forms=forms, **self._for_peft())

    def pairs(self, dtype: torch.dtype = torch.float32) -> Iterator[tuple[Site, Pair]]:
        """(site, its pair) of all in which something lives, read as they are asked for."""
        for site in self.sites:
            if pair := self.pair(site, dtype):
                yield site, pair

    @property
    def dtype(self) -> torch.dtype:
        """What forward has of weights and adapters."""
        return PRECISIONS[self.config.model.precision]

    def tensor(self, name: str) -> Tensor:
        """fp32, in its shape."""
        shape = self.manifest["tensors"][name]
        return self.slices.entries("master", name, 0, prod(shape)).view(shape)

    @cached_property
    def full(self) -> tuple[str, ...]:
        """Parameters of modules that were trained in full."""
        own = tuple(f"{site.name}." for site in self.sites)
        return tuple(name for name in self.manifest["tensors"] if not name.startswith(own))

    def plain_lora(self) -> PlainLora:
        """All of it, in memory, as forward had it."""
        adapter = self.config.adapter
        return PlainLora(
            pairs={site.name: pair for site, pair in self.pairs(self.dtype)},
            rank=adapter.rank,
            alpha=adapter.alpha,
            dropout=adapter.dropout,
            **self._for_peft(),
        )

    def _for_peft(self) -> dict[str, Any]:
        """The fields of ``ForPeft``."""
        return {
            "full": {name: self.tensor(name).to(self.dtype) for name in self.full},
            "full_modules": self.manifest["full_modules"],
            "base": self.base,
            "revision": self.config.model.revision,
            "task_type": TASKS[self.config.model.task].peft_type,
            "classes": self.classes,
        }


def _checkpoint_in(source: Path) -> Path:
    """The checkpoint itself, or the newest of a run that is as it was saved."""
    if not source.is_dir():
        raise UserError(f"{source}: no such folder. Give a run's folder, or one of its step_... .")
    run = source / "checkpoints"
    found = checkpoint.published(run)[::-1] if run.is_dir() else [source]
    if not found:
        raise UserError(
            f"{source} has no published checkpoint yet. Train until the first --save_every, or "
            "let the run end."
        )
    damages = []
    for path in found:
        damage = checkpoint.find_damage(path)
        if damage is None:
            return path
        damages.append(damage)
    raise UserError(
        f"{damages[0]} Name another checkpoint, or export with the version that saved it."
    )
