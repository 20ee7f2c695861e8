"""Write a folder of safetensors files tensor by tensor, holding only the block being written.

Each file begins with room for its header, and the header is written last. Until then the file does
not open as safetensors, so a file that was cut short cannot be taken for a whole one.
"""

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
"""Once a file has this many bytes, the next tensor begins a new file."""
HEADER_BYTES = 4 * 2**20
"""Largest room for the header of one file."""
ABOUT_ONE = 128
"""Upper bound of the header's bytes for one tensor, besides its name."""


class SafetensorsWriter:
    """Writer of a folder of safetensors files with an index. Not collective.

    Args:
        folder: an existing folder.
        header_bytes: upper bound of the bytes of all headers together.
        stem: beginning of the file names: ``STEM-00001-of-00003.safetensors``.
    """

    def __init__(
        self, folder: Path, header_bytes: int = HEADER_BYTES, *, stem: str = "model"
    ) -> None:
        self.folder, self.stem = folder, stem
        self._room = -(-min(header_bytes, HEADER_BYTES) // 8) * 8  # tensors begin aligned
        self._files: list[FileIO] = []
        self._headers: list[dict[str, Any]] = []
        self._header_bytes = self._position = 0  # in the file being written

    def add(self, name: str, dtype: str, shape: Sequence[int], blocks: Iterable[Tensor]) -> None:
        """Append one tensor.

        Args:
            name: its name.
            dtype: name of its dtype in a safetensors header, such as "BF16".
            shape: its shape.
            blocks: its values in order, cut anywhere; blocks of any dtype are written as raw bytes.

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
        """Append a tensor that is in host memory, in its own dtype."""
        self.add(name, NAMES[tensor.dtype], tensor.shape, [tensor])

    def finish(self) -> None:
        """Write the headers, rename the files and write the index; all is synced to disk.

        Raises:
            OSError: no space, no permission, a broken disk.
        """
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
        """Close the files without finishing them, after an error."""
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
"""torch dtype -> its name in a safetensors header."""


def _write_all(file: FileIO, data: bytes | memoryview) -> None:
    """Write all of ``data``. One write may take less: at most 2 GB on Linux, or what a nearly full
    disk still takes."""
    done = 0
    while done < len(data):
        done += file.write(data[done:])


def write_synced(path: Path, content: object) -> None:
    """Write ``content`` as JSON and sync the file to disk."""
    with path.open("w") as file:
        json.dump(content, file, indent=2)
        file.flush()
        os.fsync(file.fileno())
