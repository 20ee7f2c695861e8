"""A safetensors checkpoint on disk: what it holds, checked before anyone reads, and flat ranges of
it.

    Entry     one tensor of a file
    Source    what a parameter is in the files: the elements of some entries, one after another

Ranges are read with plain reads, not mapped: mapped pages count against the process until the
kernel takes them back. ``safe_open`` hands out whole rows only; a ZeRO-3 share starts anywhere
inside one.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from io import FileIO
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from sparse_lora_dist.errors import UserError

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "U8": torch.uint8}
FLOATS = ("BF16", "F16", "F32")
CPU = torch.device("cpu")
MAX_HEADER_BYTES = 100_000_000  # the format's own limit

BLOCK_BYTES = 2**26
"""Read at a time for a GPU, through pinned memory: PyTorch keeps what it pinned, for ever."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor: where its bytes lie."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    """Byte offset in the file of the first element."""
    nbytes: int

    @property
    def itemsize(self) -> int:
        return DTYPES[self.dtype].itemsize


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """What a parameter is in the files: the elements of its parts, one part after another."""

    keys: tuple[str, ...]
    """The parts' names in the files."""
    parts: tuple[Entry | bytes, ...]
    """Where they lie; a few bytes may be given as they are."""
    dtype: torch.dtype

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Of the parts."""
        return [p.shape for p in self.parts if isinstance(p, Entry)]

    @property
    def nbytes(self) -> int:
        return sum(len(p) if isinstance(p, bytes) else p.nbytes for p in self.parts)


class CheckpointFiles:
    """Every tensor of a model folder, by name. Opening reads headers only and checks them against
    the sizes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bytes_read = 0
        self.entries: dict[str, Entry] = {}
        for file in _files_of(folder):
            self.entries |= read_header(file)
        self._check_index()

    def _check_index(self) -> None:
        index = self.folder / "model.safetensors.index.json"
        if not index.exists():
            return
        missing = [n for n in json.loads(index.read_text())["weight_map"] if n not in self.entries]
        if missing:
            raise UserError(
                f"{index} names {len(missing)} tensors that no file holds, "
                f"the first is {missing[0]!r}. Download the model again."
            )

    def whole(self, key: str) -> Tensor:
        """A small tensor, 1-D, in the file's dtype."""
        entry = self.entries[key]
        source = Source(keys=(key,), parts=(entry,), dtype=DTYPES[entry.dtype])
        return self.read(source, 0, entry.nbytes // entry.itemsize)

    def raw(self, entry: Entry, component_bytes: int) -> Iterator[Tensor]:
        """A tensor's bytes as they are, some at a time."""
        source = Source(keys=(), parts=(entry,), dtype=torch.uint8)
        for start in range(0, entry.nbytes, component_bytes):
            yield self.read(source, start, min(start + component_bytes, entry.nbytes))

    def same(self, key: str, other: str, rank: int, ranks: int) -> bool:
        """Do two tensors hold the same bytes, in one rank's part of them?"""
        one, two = self.entries[key], self.entries[other]
        if (one.dtype, one.shape) != (two.dtype, two.shape):
            return False
        share = -(-one.nbytes // ranks)
        last = min((rank + 1) * share, one.nbytes)
        raw = [Source(keys=(), parts=(entry,), dtype=torch.uint8) for entry in (one, two)]
        return all(
            torch.equal(*(self.read(r, start, min(start + BLOCK_BYTES, last)) for r in raw))
            for start in range(rank * share, last, BLOCK_BYTES)
        )

    def read(self, source: Source, start: int, stop: int, *, device: torch.device = CPU) -> Tensor:
        """Elements [start, stop) of a source, 1-D, on ``device``; only their bytes are read.

        A copy to a GPU may still be under way: it is in order on the caller's current stream.
        """
        out = torch.empty(max(stop - start, 0), dtype=source.dtype, device=device)
        if device.type == "cpu":
            self._fill(out, source, start)
            return out
        for block in out.split(BLOCK_BYTES // out.element_size()):
            # PyTorch hands a pinned block to nobody else before the copy from it is done.
            pinned = torch.empty_like(block, device=CPU, pin_memory=True)
            self._fill(pinned, source, start)
            block.copy_(pinned, non_blocking=True)
            start += block.numel()
        return out

    def _fill(self, out: Tensor, source: Source, start: int) -> None:
        """``out``, 1-D in host memory, with the elements from ``start`` on."""
        first = start * out.element_size()
        last = first + out.nbytes
        buffer = out.view(torch.uint8).numpy().data
        begin = 0  # of the part, in the source
        for part in source.parts:
            length = len(part) if isinstance(part, bytes) else part.nbytes
            low, high = max(first, begin), min(last, begin + length)
            if low < high:
                self._read_part(part, low - begin, buffer[low - first : high - first])
            begin += length

    def _read_part(self, part: Entry | bytes, offset: int, buffer: memoryview) -> None:
        if isinstance(part, bytes):
            buffer[:] = part[offset : offset + len(buffer)]
            return
        try:
            with part.file.open("rb", buffering=0) as file:
                file.seek(part.start + offset)
                _read_into(file, buffer, part.file)
        except OSError as error:
            raise UserError(f"{part.file} cannot be read any more: {error}") from error
        self.bytes_read += len(buffer)


def _files_of(folder: Path) -> list[Path]:
    """The safetensors files the index names, or the single file."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        try:
            files = set(json.loads(index.read_text())["weight_map"].values())
            names = sorted(str(file) for file in files)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{index} is not a safetensors index: {error}. Download it again."
            ) from error
        absent = [name for name in names if not (folder / name).exists()]
        if absent:
            raise UserError(
                f"{index} names {len(absent)} files that are not there, the first is {absent[0]}."
            )
        return [folder / name for name in names]
    if (folder / "model.safetensors").exists():
        return [folder / "model.safetensors"]
    there = sorted(p.name for p in folder.iterdir())[:10] if folder.is_dir() else "no such folder"
    raise UserError(
        f"{folder} holds no model.safetensors and no model.safetensors.index.json "
        f"(it holds {there}). Only safetensors are read; convert pickled .bin files, or GGUF, with "
        "transformers: AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)."
    )


def read_header(file: Path) -> dict[str, Entry]:
    """Name -> entry for one file; a file that is cut short or not safetensors is an error that
    names it."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or not 0 < length <= min(size - 8, MAX_HEADER_BYTES):
            raise UserError(
                f"{file} is no safetensors file, or is cut short ({size} bytes). Download it again."
            )
        try:
            header = json.loads(stream.read(length))
            return _entries(file, header, data_start=8 + length, size=size)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{file} has a broken safetensors header: {error}. Download it again."
            ) from error


def _entries(
    file: Path, header: dict[str, dict[str, list[int]]], data_start: int, size: int
) -> dict[str, Entry]:
    entries = {}
    for name, about in header.items():
        if name == "__metadata__":
            continue
        start, stop = about["data_offsets"]
        dtype, shape = str(about["dtype"]), tuple(about["shape"])
        if data_start + stop > size:
            raise UserError(
                f"{file} is cut short: tensor {name!r} should end at byte {data_start + stop}, "
                f"the file has {size}. Download it again."
            )
        nbytes = stop - start
        if dtype in DTYPES and nbytes != prod(shape) * DTYPES[dtype].itemsize:
            raise ValueError(f"tensor {name!r} of {list(shape)} {dtype} spans {nbytes} bytes")
        entries[name] = Entry(
            file=file, dtype=dtype, shape=shape, start=data_start + start, nbytes=nbytes
        )
    return entries


def _read_into(file: FileIO, buffer: memoryview, path: Path) -> None:
    """Fill ``buffer``; one read may return less than asked (Linux stops at 2 GB)."""
    done = 0
    while done < len(buffer):
        got = file.readinto(buffer[done:])
        if not got:
            raise UserError(
                f"{path} ended {len(buffer) - done} bytes early while it was read. "
                "Is it being changed?"
            )
        done += got
