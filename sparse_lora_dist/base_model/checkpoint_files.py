"""A safetensors checkpoint on disk: what it holds, checked before anyone reads, and flat ranges of
it.

Ranges are read with plain reads, not mapped: mapped pages count against the process until the
kernel takes them back. ``safe_open`` hands out whole rows only; a ZeRO-3 share starts anywhere
inside one.
"""

import json
from collections.abc import Collection
from dataclasses import dataclass
from io import FileIO
from math import prod
from pathlib import Path

import torch
from torch import Tensor, nn

from sparse_lora_dist.errors import UserError

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
MAX_HEADER_BYTES = 100_000_000  # the format's own limit


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor: where its bytes lie."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    """Byte offset in the file of the first element."""

    @property
    def itemsize(self) -> int:
        return DTYPES[self.dtype].itemsize


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

    def entry(self, name: str, shape: tuple[int, ...]) -> Entry:
        """Where ``name`` lies, once it is sure to be there, of that shape and a dtype we read."""
        found = self.entries.get(name)
        if found is None:
            raise UserError(
                f"{self.folder} holds no tensor {name!r}, which config.json asks for. "
                "Is it the checkpoint of another architecture, or an incomplete download?"
            )
        if found.shape != shape:
            raise UserError(
                f"{found.file}: tensor {name!r} has shape {list(found.shape)}, "
                f"but config.json makes it {list(shape)}. "
                "Weights and config.json do not belong together."
            )
        if found.dtype not in DTYPES:
            raise UserError(
                f"{found.file}: tensor {name!r} is {found.dtype}; allowed are {', '.join(DTYPES)}. "
                "Already quantised checkpoints are not read yet; use the original weights."
            )
        return found

    def check(self, model: nn.Module, *, new: Collection[str] = ()) -> None:
        """Every parameter of ``model`` but those of ``new`` must be here, in its shape. Tied ones
        are asked for once."""
        for name, parameter in model.named_parameters():
            if name not in new:
                self.entry(name, tuple(parameter.shape))

    def read(self, name: str, shape: tuple[int, ...], start: int, stop: int) -> Tensor:
        """Elements [start, stop) of the flattened tensor, 1-D, in the file's dtype; only their
        bytes are read."""
        entry = self.entry(name, shape)
        out = torch.empty(max(stop - start, 0), dtype=DTYPES[entry.dtype])
        if out.numel() == 0:
            return out
        with entry.file.open("rb", buffering=0) as file:
            file.seek(entry.start + start * out.element_size())
            _read_into(file, out.view(torch.uint8).numpy().data, entry.file)
        self.bytes_read += out.nbytes
        return out


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
        f"(it holds {there}). Only safetensors are read; convert pickled .bin files with "
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
        if dtype in DTYPES and stop - start != prod(shape) * DTYPES[dtype].itemsize:
            raise ValueError(f"tensor {name!r} of {list(shape)} {dtype} spans {stop - start} bytes")
        entries[name] = Entry(file=file, dtype=dtype, shape=shape, start=data_start + start)
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
