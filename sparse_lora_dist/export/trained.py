"""What a checkpoint holds, read one linear at a time by one process, without the model."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparse_lora_dist import checkpoint
from sparse_lora_dist.adapter import AdapterLinear, RowSeeds
from sparse_lora_dist.checkpoint import SavedSlices
from sparse_lora_dist.command_line import saved_config
from sparse_lora_dist.config import Config
from sparse_lora_dist.errors import UserError
from sparse_lora_dist.export.peft_adapter import Pair, PlainLora, live_pair
from sparse_lora_dist.methods import METHODS, Method
from sparse_lora_dist.methods.base import Pieces, Plan, Site
from sparse_lora_dist.tasks import TASKS


@dataclass(frozen=True, kw_only=True)
class Trained:
    """The newest whole checkpoint of a run, or the one that was named."""

    path: Path
    manifest: Mapping[str, Any]
    config: Config
    slices: SavedSlices

    @classmethod
    def open(cls, source: Path) -> "Trained":
        """From a run's folder, or a checkpoint's.

        Raises:
            UserError: there is none, or it is damaged.
        """
        path = _checkpoint_in(source)
        manifest = checkpoint.read_manifest(path)
        if damage := checkpoint.find_damage(path):
            raise UserError(f"{damage} Name another checkpoint.")
        return cls(
            path=path,
            manifest=manifest,
            config=saved_config(manifest["config"]),
            slices=SavedSlices(path, [file["name"] for file in manifest["files"]]),
        )

    @property
    def base(self) -> str:
        """What the run called its base: a hub id, or a folder."""
        return str(self.manifest["base"])

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
        train = self.config.train
        plan = Plan(
            total_steps=self.manifest["total_steps"],
            warmup_steps=train.warmup_steps,
            learning_rate=train.learning_rate,
            sites=self.sites,
        )
        return METHODS[self.config.adapter.method].build(self.config.method_options, plan)

    def pair(self, site: Site) -> Pair | None:
        """The plain LoRA of a site, of the pieces that do something; None where none does."""
        named = {key: self.tensor(f"{site.name}.{key}") for key in self.method.tensors(site)}
        adapter = AdapterLinear(
            nn.Identity(),  # type: ignore[arg-type]  # its base computes nothing here
            site,
            self.method,
            {key: nn.Parameter(t, requires_grad=False) for key, t in named.items()},
            alpha=self.config.adapter.alpha,
            dropout=0.0,
            row_seeds=RowSeeds(seed=0, sequence_length=1),
        )
        computed, opened = self.manifest["sites"]["pieces"][site.name]
        adapter.set_pieces(Pieces(computed=tuple(computed), open=opened))
        with torch.no_grad():
            return live_pair(adapter, list(named.values()))

    def pairs(self) -> Iterator[tuple[str, Pair]]:
        """(site, its pair) of all in which something lives, read as they are asked for."""
        for site in self.sites:
            if pair := self.pair(site):
                yield site.name, pair

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
        """All of it, in memory."""
        adapter, described = self.config.adapter, self.manifest["description"]
        return PlainLora(
            pairs=dict(self.pairs()),
            full={name: self.tensor(name) for name in self.full},
            full_modules=self.manifest["full_modules"],
            rank=adapter.rank,
            alpha=adapter.alpha,
            dropout=adapter.dropout,
            base=self.base,
            task_type=TASKS[self.config.model.task].peft_type,
            classes=described.get("classes", ()),
        )


def _checkpoint_in(source: Path) -> Path:
    if (source / "checkpoints").is_dir():
        newest = checkpoint.newest_whole(source / "checkpoints")
        if newest is None:
            raise UserError(
                f"{source} has no published checkpoint yet. Train until the first --save_every, or "
                "let the run end."
            )
        return newest
    if not source.is_dir():
        raise UserError(f"{source}: no such folder. Give a run's folder, or one of its step_... .")
    return source
