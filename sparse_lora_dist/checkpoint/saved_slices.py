"""Read ranges of a checkpoint's tensors from the files of the ranks that saved them.

A checkpoint can be read by another number of ranks than wrote it. A tensor of 10 entries, written
by 2 ranks and read by 3:

    written   rank 0: [0, 5)             rank 1: [5, 10)
    read      rank 0: [0, 4)    rank 1: [4, 8)    rank 2: [8, 10)

Rank 1 reads [4, 8): entry 4 is entry 4 of file 0, and [5, 8) are entries [0, 3) of file 1.

Moments and birth steps are stored only for live entries, which are those that the optimizer steps.
So where an entry's value lies in the file follows from the live bits before the entry. If the live
bits of file 1 are 1 0 1 1 1, its ``exp_avg`` has 4 values. Entries [1, 3) of the slice have the
bits 0 1, and one live entry lies before them. So entry 1 is read as zero, and entry 2 as value 1 of
the file, counted from 0.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from sparse_lora_dist.checkpoint.manifest import PACKED
from sparse_lora_dist.methods.shared.bit_masks import unpack_bits

DTYPES = {
    "live": torch.bool,
    "born": torch.int32,
    "kept": torch.uint8,
    "squares": torch.float64,
}
"""Kind of values -> dtype in which they are read. All other kinds are fp32."""


class SavedSlices:
    """The opened files of a checkpoint, one for each rank that saved it.

    Only the ranges that are asked for are read.

    Args:
        checkpoint: a step_... folder.
        files: names of the rank files in it, in rank order.
    """

    def __init__(self, checkpoint: Path, files: Iterable[str]) -> None:
        self.files = [safe_open(str(checkpoint / name), framework="pt") for name in files]
        self.offsets = [json.loads(f.metadata()["offsets"]) for f in self.files]

    @classmethod
    def of(cls, checkpoint: Path, manifest: Mapping[str, Any]) -> "SavedSlices":
        """Open the files of all ranks that a checkpoint's manifest lists.

        Args:
            checkpoint: a step_... folder.
            manifest: what ``read_manifest`` returned for it.
        """
        return cls(checkpoint, [file["name"] for file in manifest["files"]])

    def entries(self, key: str, name: str, first: int, last: int) -> Tensor:
        """Read entries [first, last) of a flattened tensor, from all files that hold some of them.

        Not a collective.

        Args:
            key: which values of the tensor to read: "master" (fp32 values), "live" (mask of the
                entries that the optimizer steps), "stat0" ... (importance statistics), "exp_avg",
                "exp_avg_sq", "born" (birth steps), "kept" (bytes of a tensor that no gradient
                trains) or "squares" (running mean of an adapter's squared inputs).
            name: name of the tensor; for "squares", of the linear that has the adapter.
            first: index of the first entry.
            last: index after the last entry.

        Returns:
            1-D tensor of last - first entries, on the CPU, in the dtype of ``DTYPES``. Moments and
            birth steps of dead entries, which the optimizer does not step, are zero.
        """
        out = torch.zeros(last - first, dtype=DTYPES.get(key, torch.float32))
        for file, offsets in zip(self.files, self.offsets, strict=True):
            start, length = offsets[name]
            since, until = max(start, first), min(start + length, last)
            if since < until:
                part = _entries(file, key, name, since - start, until - start)
                out[since - first : until - first] = part
        return out


def _entries(file: Any, key: str, name: str, first: int, last: int) -> Tensor:
    """Read entries of one rank's slice.

    Args:
        file: opened file of the rank.
        key: which values to read, as in ``SavedSlices.entries``.
        name: name of the tensor; for "squares", of the linear that has the adapter.
        first: index of the first entry, counted from the start of the slice.
        last: index after the last entry.

    Returns:
        1-D tensor of last - first entries, on the CPU. Moments and birth steps of dead entries are
        zero.
    """
    if key not in (*PACKED, "live"):
        return file.get_slice(f"{key}/{name}")[first:last]  # type: ignore[no-any-return]
    live = unpack_bits(file.get_slice(f"live/{name}")[: -(-last // 8)], last)
    if key == "live":
        return live[first:]
    before, count = int(live[:first].sum()), int(live[first:].sum())
    saved = file.get_slice(f"{key}/{name}")
    if key == "born" and saved.get_shape() == [1]:
        packed = saved[:].expand(count)
    else:
        packed = saved[before : before + count]
    spread: Tensor = packed.new_zeros(last - first).masked_scatter_(live[first:], packed)
    return spread
