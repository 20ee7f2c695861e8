"""Merges an adapter into its base model: adds delta W of each adapted linear to its weight.

One tensor is in memory at a time. Sums are computed in fp32 and rounded once, to the output dtype.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from sparse_lora_dist.adapter.seeds import seed_of
from sparse_lora_dist.base_model.safetensors_reader import FLOATS
from sparse_lora_dist.base_model.safetensors_writer import (
    NAMES,
    SafetensorsWriter,
    header_room,
)
from sparse_lora_dist.distributed.console import with_progress
from sparse_lora_dist.export.merged_files import copy_other_files
from sparse_lora_dist.export.open_base import Base
from sparse_lora_dist.export.trained_run import Trained
from sparse_lora_dist.export.weight_change import WeightChange
from sparse_lora_dist.methods.protocol.form import Site
from sparse_lora_dist.tasks import TASKS

BLOCK_ENTRIES = 2**23
"""Approximate number of entries of a weight that are summed and rounded at a time."""


@dataclass(kw_only=True)
class Merge:
    """Settings of a merge and, after ``write``, statistics of what it changed."""

    dtype: torch.dtype
    """Dtype of the written weights."""
    stochastic: bool
    """True: stochastic rounding to bf16. False: rounding to nearest."""
    onto: Literal["dequantised", "original"]
    """Weights that the update is added to.

    "dequantised": the weights that the run computed with; for a base in 4 bits, these are the
    dequantised values. "original": the weights in the base's files.
    """
    touched: int = 0
    """Number of single weights (entries of a matrix) with a nonzero update."""
    unchanged: int = 0
    """How many of the ``touched`` weights are, after rounding, equal to the old weight."""
    _squared_error: float = 0.0
    """Sum of (original - dequantised)^2 over all weights that the run held in 4 bits."""
    _squared_norm: float = 0.0
    """Sum of original^2 over all weights that the run held in 4 bits."""

    @property
    def quantization_error(self) -> float:
        """Relative error ||original - dequantised|| / ||original|| of the run's 4-bit weights.

        Valid after ``write``, if ``quantized`` is true.
        """
        return sqrt(self._squared_error / self._squared_norm)

    @property
    def quantized(self) -> bool:
        """True if ``write`` found weights that the run held in 4 bits."""
        return self._squared_norm > 0

    def write(self, trained: Trained, base: Base, folder: Path) -> None:
        """Write the merged model with its config and tokenizer, and update the statistics.

        Not collective. To be called once per ``Merge``.

        Args:
            trained: The run whose updates are merged. Modules that it trained in full replace those
                of the base.
            base: The base model that they are merged into.
            folder: Empty folder to write into.
        """
        copy_other_files(trained, base, folder, self.dtype)
        linears = [f"{site.name}.weight" for site in trained.sites]
        room = header_room({*base.files.entries, *base.keys_of, *trained.full, *linears})
        out = SafetensorsWriter(folder, room)
        try:
            entries = sorted(base.files.entries.items(), key=lambda e: (e[1].file, e[1].start))
            names = {keys[0]: name for name, keys in base.keys_of.items() if len(keys) == 1}
            used = {key for keys in base.keys_of.values() for key in keys}
            labels = TASKS[trained.config.model.task].trains_head
            sites = {f"{site.name}.weight": site for site in trained.sites}
            for key, entry in with_progress(entries, "merging"):
                if labels and key not in used:  # the head of the base, which the run replaced
                    continue
                name = names.get(key, key)
                saved_as = name if labels else key
                if name in trained.full:
                    out.add_tensor(saved_as, trained.tensor(name).to(self.dtype))
                elif entry.dtype in FLOATS:
                    site = sites.get(name)
                    blocks = self._merged_blocks(base, key, trained.change(site) if site else None)
                    out.add(saved_as, NAMES[self.dtype], entry.shape, blocks)
                else:
                    out.add(
                        saved_as, entry.dtype, entry.shape, base.files.raw(entry, BLOCK_ENTRIES)
                    )
            for name in trained.full:
                if name not in base.keys_of:
                    out.add_tensor(name, trained.tensor(name).to(self.dtype))
            for site in trained.sites:
                if f"{site.name}.weight" not in base.keys_of:
                    self._add_untied(out, base, site)
            out.finish()
        finally:
            out.close()

    def _add_untied(self, out: SafetensorsWriter, base: Base, site: Site) -> None:
        """Write the weight of a site whose base weight the files hold under another name, since it
        is tied to another parameter. That one is written as it is."""
        name, (key,) = f"{site.name}.weight", base.keys_of_site(site)
        saved_as = name if base.saved_class is None else base.saved_class.named(name)
        blocks = self._merged_blocks(base, key, base.trained.change(site))
        out.add(saved_as, NAMES[self.dtype], base.files.entries[key].shape, blocks)

    def _merged_blocks(self, base: Base, key: str, change: WeightChange | None) -> Iterator[Tensor]:
        """Yield a floating-point tensor of the base with its update added, a few rows at a time.

        Args:
            base: The base model.
            key: Name of the tensor in the base's files.
            change: Update to add; None: the tensor is only cast to the output dtype.

        Yields:
            Consecutive rows of the tensor, [number of rows, entries per row], in the output dtype.
            A row holds the entries with one index in the first dimension.
        """
        entry = base.files.entries[key]
        w = base.read(key)
        if key in base.quantized:
            w = self._quantized_weight(w, base, key)
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

    def _quantized_weight(self, w: Tensor, base: Base, key: str) -> Tensor:
        """Return the weight to add the update to; add its quantisation error to the statistics.

        To be called for weights that the run held in 4 bits.

        Args:
            w: Original weight, flattened.
            base: The base model.
            key: Name of the weight in the base's files.

        Returns:
            ``w``, or ``w`` quantised and dequantised as in the run, flattened: see ``onto``.
        """
        dequantised = base.dequantised(w, key)
        blocks = zip(w.split(BLOCK_ENTRIES), dequantised.split(BLOCK_ENTRIES), strict=True)
        for original, rounded in blocks:
            self._squared_error += float((original.float() - rounded.float()).square().sum())
            self._squared_norm += float(original.float().square().sum())
        return dequantised if self.onto == "dequantised" else w

    def _rounded(self, before: Tensor, delta: Tensor, generator: torch.Generator) -> Tensor:
        touched, after = delta != 0, before + delta
        if self.stochastic:
            after = torch.where(touched, _stochastic_bf16(after.clone(), generator), after)
        rounded = after.to(self.dtype)
        self.touched += int(touched.sum())
        self.unchanged += int((touched & (rounded == before.to(self.dtype))).sum())
        return rounded


def _stochastic_bf16(x: Tensor, generator: torch.Generator) -> Tensor:
    """Round fp32 entries in place to a neighbouring bf16 value, without bias.

    The expected value of each rounded entry is the entry. bf16 is the upper 16 bits of fp32. A
    random 16-bit number is added and the lower 16 bits are cleared, so an entry is rounded away
    from zero with probability (lower bits) / 2^16:

        lower bits 0x4000: 1/4 of the random numbers carry into the upper bits
        lower bits 0x0000: no random number carries, so a bf16 value keeps its value

    Args:
        x: fp32 tensor. It is changed in place.
        generator: Source of the random numbers.

    Returns:
        ``x``, fp32, with every entry exact in bf16.
    """
    bits = x.view(torch.int32)
    bits += torch.randint(2**16, bits.shape, dtype=torch.int32, generator=generator)
    bits &= -(2**16)
    return x
