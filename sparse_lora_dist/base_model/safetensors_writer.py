"""A folder of safetensors files, written front to back: no more is held than what is being
written."""

import json
import os
from collections.abc import Iterable, Sequence
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparse_lora_dist.base_model.safetensors_reader import DTYPES

FILE_BYTES = 5 * 10**9
"""A file that has so many is closed, and the next one begun."""
HEADER_BYTES = 4 * 2**20
"""Room for the header at the head of a file, at most."""
ABOUT_ONE = 128
"""Bytes of the header that one tensor takes besides its name, at most."""


class SafetensorsWriter:
    """The header of a file comes last, into the room that was left for it: a file cut short is no
    safetensors file."""

    def __init__(
        self, folder: Path, header_bytes: int = HEADER_BYTES, *, stem: str = "model"
    ) -> None:
        """``header_bytes``: what all headers together need at most; ``stem``: how names begin."""
        self.folder, self.stem = folder, stem
        self._room = -(-min(header_bytes, HEADER_BYTES) // 8) * 8  # tensors begin aligned
        self._files: list[FileIO] = []
        self._headers: list[dict[str, Any]] = []
        self._header_bytes = self._position = 0  # of the file being written

    def add(self, name: str, dtype: str, shape: Sequence[int], blocks: Iterable[Tensor]) -> None:
        """One tensor, its bytes in blocks.

        Raises:
            OSError: no space, no permission, a broken disk.
        """
        about_it = len(json.dumps(name)) + ABOUT_ONE
        full = self._position >= FILE_BYTES or self._header_bytes + about_it > self._room
        if full or not self._files:
            self._begin_file()
        start = self._position
        for block in blocks:
            self._position += block.nbytes
            _write_all(self._files[-1], block.contiguous().flatten().view(torch.uint8).numpy().data)
        offsets = [start, self._position]
        self._headers[-1][name] = {"dtype": dtype, "shape": list(shape), "data_offsets": offsets}
        self._header_bytes += about_it

    def add_tensor(self, name: str, tensor: Tensor) -> None:
        """The same for a tensor in memory."""
        self.add(name, NAMES[tensor.dtype], tensor.shape, [tensor])

    def finish(self) -> None:
        """Headers, names and the index; everything is on disk when this returns."""
        count = len(self._files)
        weight_map: dict[str, str] = {}
        for number, (file, header) in enumerate(zip(self._files, self._headers, strict=True), 1):
            text = json.dumps({"__metadata__": {"format": "pt"}} | header).encode()
            file.seek(8)
            _write_all(file, text.ljust(self._room))  # the format allows spaces at the end
            file.seek(0)
            _write_all(file, self._room.to_bytes(8, "little"))
            os.fsync(file.fileno())
            file.close()
            name = f"{self.stem}-{number:05d}-of-{count:05d}.safetensors"
            (self.folder / f"{number}.part").rename(self.folder / name)
            weight_map |= dict.fromkeys(header, name)
        sizes = [about["data_offsets"] for header in self._headers for about in header.values()]
        total = sum(stop - start for start, stop in sizes)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_synced(self.folder / f"{self.stem}.safetensors.index.json", index)

    def close(self) -> None:
        """Let go of what was not finished."""
        for file in self._files:
            file.close()

    def _begin_file(self) -> None:
        file = (self.folder / f"{len(self._files) + 1}.part").open("wb", buffering=0)
        file.seek(8 + self._room)
        self._files.append(file)
        self._headers.append({})
        self._header_bytes = self._position = 0


NAMES = {dtype: name for name, dtype in DTYPES.items()} | {
    torch.int32: "I32",
    torch.int64: "I64",
}


def _write_all(file: FileIO, data: bytes | memoryview) -> None:
    """One write may take less than it was given: Linux stops at 2 GB, and where a disk is full."""
    done = 0
    while done < len(data):
        done += file.write(data[done:])


def write_synced(path: Path, content: object) -> None:
    """JSON, on disk when this returns."""
    with path.open("w") as file:
        json.dump(content, file, indent=2)
        file.flush()
        os.fsync(file.fileno())
