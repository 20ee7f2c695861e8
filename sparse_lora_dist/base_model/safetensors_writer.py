"""Write a folder of safetensors files tensor by tensor, and each tensor block by block.

So only one block, a part of a tensor, has to be in memory at a time.


Space for the header is reserved at the beginning of each file, and the header is written last.
Until then the file cannot be opened as safetensors, so an incomplete file is never mistaken for a
complete one.
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
"""Largest space, in bytes, reserved for the header of one file."""
ABOUT_ONE = 128
"""Upper bound of the bytes that the description of one tensor takes in the header, not counting the
tensor's name."""


def header_room(names: Iterable[str]) -> int:
    """Return an upper bound of the bytes of the headers of files with tensors of these names."""
    return sum(len(json.dumps(name)) + ABOUT_ONE for name in names)


class SafetensorsWriter:
    """Writes tensors to a folder of safetensors files with an index. Not collective.

    Call ``add`` or ``add_tensor`` for each tensor, and then ``finish`` once. After an error call
    ``close`` instead.

    Args:
        folder: an existing folder to write to.
        header_bytes: upper bound of the bytes of all headers together. Each file reserves this
            much for its header, but no more than ``HEADER_BYTES``.
        stem: first part of the file names, as in ``STEM-00001-of-00003.safetensors``.
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
        """Append one tensor, which is passed in blocks.

        Args:
            name: name of the tensor in the file.
            dtype: name of its dtype in the safetensors header, such as "BF16".
            shape: shape of the tensor.
            blocks: the tensor's values in order, cut into blocks of any length. Their raw bytes are
                written, whatever the dtype of a block.

        Raises:
            OSError: the file cannot be written, for example since the disk is full.
        """
        about_it = header_room([name])
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
        """Append a tensor in its own dtype. It must be in host memory."""
        self.add(name, NAMES[tensor.dtype], tensor.shape, [tensor])

    def finish(self) -> None:
        """Complete the files: write the headers, rename the files, write the index.

        Call it once, after the last tensor. The contents of the files are synced to disk.

        Raises:
            OSError: a file cannot be written, for example since the disk is full.
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
        """Close the files without completing them, after an error."""
        for file in self._files:
            file.close()

    def _begin_file(self) -> None:
        file = (self.folder / f"{len(self._files) + 1}.part").open("wb", buffering=0)
        file.seek(8 + self._room)
        self._files.append(file)
        self._headers.append({})
        self._header_bytes = self._position = 0


NAMES = {dtype: name for name, dtype in DTYPES.items()}
"""Name of a dtype in a safetensors header, by torch dtype."""


def _write_all(file: FileIO, data: bytes | memoryview) -> None:
    """Write all of ``data`` to the file.

    It writes in a loop, since one write may take fewer bytes: at most 2 GB on Linux, and less on a
    nearly full disk.
    """
    done = 0
    while done < len(data):
        done += file.write(data[done:])


def write_synced(path: Path, content: object) -> None:
    """Write ``content`` as JSON to ``path``, and sync the file to disk.

    Args:
        path: file to create or overwrite.
        content: object that ``json.dump`` accepts.
    """
    with path.open("w") as file:
        json.dump(content, file, indent=2)
        file.flush()
        os.fsync(file.fileno())
