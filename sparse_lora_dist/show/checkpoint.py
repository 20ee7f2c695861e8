"""The modules of a checkpoint, through the eyes of the method that trained them.

Shapes: I in_features, O out_features, R rank.
"""

from collections.abc import Iterator, Mapping
from dataclasses import fields
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparse_lora_dist.checkpoint import SavedSlices
from sparse_lora_dist.errors import UserError
from sparse_lora_dist.methods import METHODS, Method, Plan
from sparse_lora_dist.methods.base import Site
from sparse_lora_dist.screen import counted
from sparse_lora_dist.show.table import Module, norm_of


def head(checkpoint: Path, manifest: Mapping[str, Any]) -> str:
    """What it says of itself."""
    step, total = manifest["progress"]["step"], manifest["total_steps"]
    return (
        f"saved     {checkpoint}: {manifest['config']['method']}, step {step} of {total}, "
        f"by {counted(manifest['world_size'], 'rank')}"
    )


def modules(checkpoint: Path, manifest: Mapping[str, Any]) -> Iterator[Module]:
    """Each with its numbers, one read at a time; what was trained in full comes last."""
    saved = _Saved(checkpoint, manifest)
    for site in saved.method_sites:
        yield saved.adapted(site)
    for name in manifest["tensors"]:
        if name.rpartition(".")[0] not in manifest["sites"]["pieces"]:
            yield saved.full(name)


class _Saved:
    def __init__(self, checkpoint: Path, manifest: Mapping[str, Any]) -> None:
        self.shapes: Mapping[str, list[int]] = manifest["tensors"]
        self.pieces: Mapping[str, tuple[list[int], int]] = manifest["sites"]["pieces"]
        self.alpha: float = manifest["config"]["alpha"]
        self.method_sites = [self._site(name) for name in self.pieces]
        self.method = _method(checkpoint, manifest, self.method_sites)
        self.slices = SavedSlices(checkpoint, [file["name"] for file in manifest["files"]])
        self.bytes = _bytes(self.slices)

    def _site(self, name: str) -> Site:
        (rank, num_in), (num_out, _) = (self.shapes[f"{name}.lora_{x}"] for x in "ab")
        return Site(name=name, in_features=num_in, out_features=num_out, rank=rank)

    def adapted(self, site: Site) -> Module:
        """A site: what is live of its tensors, and the delta that they make."""
        computed, open_pieces = self.pieces[site.name]
        specs = self.method.tensors(site)
        names = {key: f"{site.name}.{key}" for key in specs}
        places = torch.tensor(computed, dtype=torch.int64)
        tensors = {
            key: _along(self._whole("master", name), specs[key].piece_axis, places)
            for key, name in names.items()
        }
        a_RI, b_OR = self.method.to_lora(tensors)
        return Module(
            name=site.name,
            rank=open_pieces,
            capacity=site.rank,
            entries=sum(prod(self.shapes[name]) for name in names.values()),
            alive=sum(self._num_live(name) for name in names.values()),
            bytes=sum(self.bytes[name] for name in names.values()),
            norm=norm_of(a_RI, b_OR, self.method.scale(self.alpha, site.rank, open_pieces)),
        )

    def full(self, name: str) -> Module:
        """A tensor that was trained in place of the base's."""
        size = prod(self.shapes[name])
        alive = self._num_live(name)
        return Module(name=name, entries=size, alive=alive, bytes=self.bytes[name])

    def _whole(self, key: str, name: str) -> Tensor:
        shape = self.shapes[name]
        return self.slices.entries(key, name, 0, prod(shape)).view(shape)

    def _num_live(self, name: str) -> int:
        return int(self._whole("live", name).sum())


def _along(tensor: Tensor, axis: int | None, places: Tensor) -> Tensor:
    return tensor if axis is None else tensor.index_select(axis, places)


def _method(checkpoint: Path, manifest: Mapping[str, Any], sites: list[Site]) -> Method:
    """The record that trained it, from the options that it was given."""
    config = manifest["config"]
    if config["method"] not in METHODS:
        raise UserError(f"{checkpoint} is of method {config['method']}, unknown to this version.")
    factory = METHODS[config["method"]]
    given = {f.name: config[f.name] for f in fields(factory.options)}
    # JSON has no tuples.
    given = {name: tuple(v) if isinstance(v, list) else v for name, v in given.items()}
    plan = Plan(
        total_steps=manifest["total_steps"],
        warmup_steps=config["warmup_steps"],
        learning_rate=config["learning_rate"],
        sites=tuple(sites),
    )
    return factory.build(factory.options(**given), plan)


def _bytes(slices: SavedSlices) -> dict[str, int]:
    """Tensor -> bytes of all that is saved of it: master, bits, statistics, moments."""
    sizes: dict[str, int] = {}
    for file in slices.files:
        for key in file.keys():  # noqa: SIM118  safe_open is no dict
            saved = file.get_slice(key)
            name = key.partition("/")[2]
            size = prod(saved.get_shape()) * WIDTHS[saved.get_dtype()]
            sizes[name] = sizes.get(name, 0) + size
    return sizes


WIDTHS = {"F32": 4, "I32": 4, "U8": 1, "BOOL": 1, "F16": 2, "BF16": 2, "I64": 8}
"""Bytes of an entry, by the file's name of its type."""
