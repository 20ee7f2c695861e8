"""A whole model, the deltas added to its weights: tensor after tensor, one at a time in memory.

Sums are made in fp32 and rounded once. Shapes: O out_features, I in_features, L live components.
"""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from tqdm import tqdm

from sparse_lora_dist.adapter.seeds import seed_of
from sparse_lora_dist.base_model.safetensors_reader import FLOATS
from sparse_lora_dist.base_model.safetensors_writer import NAMES, SafetensorsWriter
from sparse_lora_dist.export.open_base import Base, read_labelled_config
from sparse_lora_dist.export.trained_run import Trained
from sparse_lora_dist.export.weight_change import Change
from sparse_lora_dist.tasks import TASKS

BLOCK_ENTRIES = 2**23
"""Weights that are summed and rounded at a time."""
NOT_COPIED = (
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".gguf",
    ".onnx",
    ".msgpack",
    ".h5",
    ".ot",
    ".ckpt",
    ".npz",
)
"""Endings of weights. What else lies beside them, tokenizers say, goes along."""


@dataclass(kw_only=True)
class Merge:
    """How to merge; and, once it is done, what that did."""

    dtype: torch.dtype
    stochastic: bool
    onto: Literal["dequantised", "original"]
    touched: int = 0
    """Weights with a delta other than zero."""
    unchanged: int = 0
    """Of these, those that rounding left as they were."""
    _apart: float = 0.0
    """||W - dequantised||^2 of all weights that the run had in 4 bits."""
    _whole: float = 0.0
    """||W||^2 of the same."""

    @property
    def distance(self) -> float:
        """||W - dequantised|| / ||W||."""
        return sqrt(self._apart / self._whole)

    @property
    def quantized(self) -> bool:
        return self._whole > 0

    def write(self, trained: Trained, base: Base, folder: Path) -> None:
        """The model of ``base`` with what was trained, into an empty ``folder``."""
        self._copy_other_files(trained, base, folder)
        out = SafetensorsWriter(folder)
        try:
            entries = sorted(base.files.entries.items(), key=lambda e: (e[1].file, e[1].start))
            names = {keys[0]: name for name, keys in base.keys_of.items() if len(keys) == 1}
            used = {key for keys in base.keys_of.values() for key in keys}
            labels = TASKS[trained.config.model.task].trains_head
            sites = {f"{site.name}.weight": site for site in trained.sites}
            for key, entry in tqdm(entries, desc="merging", leave=False):
                if labels and key not in used:  # the head that it had before
                    continue
                name = names.get(key, key)
                saved_as = name if labels else key
                if name in trained.full:
                    out.add_tensor(saved_as, trained.tensor(name).to(self.dtype))
                elif entry.dtype in FLOATS:
                    site = sites.get(name)
                    components = self._components(base, key, trained.change(site) if site else None)
                    out.add(saved_as, NAMES[self.dtype], entry.shape, components)
                else:
                    out.add(
                        saved_as, entry.dtype, entry.shape, base.files.raw(entry, BLOCK_ENTRIES)
                    )
            for name in trained.full:
                if name not in base.keys_of:
                    out.add_tensor(name, trained.tensor(name).to(self.dtype))
            out.finish()
        finally:
            out.close()

    def _components(self, base: Base, key: str, change: Change | None) -> Iterator[Tensor]:
        """A tensor of floats, some rows at a time."""
        entry = base.files.entries[key]
        w = base.read(key)
        if key in base.quantized:
            w = self._as_trained_over(w, base, key)
        elif self.onto == "dequantised":
            w = w.to(base.trained.dtype)
        rows = w.view(entry.shape[0], -1) if entry.shape else w.view(1, 1)
        step = max(1, BLOCK_ENTRIES // rows.shape[1])
        generator = torch.Generator().manual_seed(seed_of("rounding", key))
        for start in range(0, len(rows), step):
            before = rows[start : start + step].float()
            if change is None:
                yield before.to(self.dtype)
            else:
                yield self._rounded(before, change.rows(start, start + step), generator)

    def _as_trained_over(self, w: Tensor, base: Base, key: str) -> Tensor:
        again = base.dequantised(w, key)
        for ours, theirs in zip(w.split(BLOCK_ENTRIES), again.split(BLOCK_ENTRIES), strict=True):
            self._apart += float((ours.float() - theirs.float()).square().sum())
            self._whole += float(ours.float().square().sum())
        return again if self.onto == "dequantised" else w

    def _rounded(self, before: Tensor, delta: Tensor, generator: torch.Generator) -> Tensor:
        touched, after = delta != 0, before + delta
        if self.stochastic:
            drawn = _up_or_down(after.clone(), generator)
            after = torch.where(touched, drawn, after)
        rounded = after.to(self.dtype)
        self.touched += int(touched.sum())
        self.unchanged += int((touched & (rounded == before.to(self.dtype))).sum())
        return rounded

    def _copy_other_files(self, trained: Trained, base: Base, folder: Path) -> None:
        for path in base.folder.iterdir():
            is_weights = path.suffix in NOT_COPIED or path.name.endswith(".index.json")
            if path.is_file() and not is_weights and path.name != "README.md":
                shutil.copyfile(path, folder / path.name)
        config = read_labelled_config(trained, base.folder)
        config.architectures = [type(base.module).__name__]
        config.dtype = self.dtype
        config.save_pretrained(folder)


def _up_or_down(x: Tensor, generator: torch.Generator) -> Tensor:
    """fp32 -> the bf16 below or above, in place, the nearer the likelier, so that the mean stays.

    The lower 16 bits of an fp32 are what bf16 has not; what is random is added to them and carries,
    or does not. A bf16 value has none, and stays.
    """
    bits = x.view(torch.int32)
    bits += torch.randint(2**16, bits.shape, dtype=torch.int32, generator=generator)
    bits &= -(2**16)
    return x
