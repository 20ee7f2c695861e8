"""Open the safetensors files of a base model, check their headers, and read flat ranges of tensors.

    Entry     position, dtype and shape of one tensor in a file
    Source    one or more entries, one after another, that hold the elements of one parameter of the
              model; flattened and joined in this order, they are read as one 1-D tensor

Ranges are read with ordinary reads and not by memory mapping, since memory-mapped pages would count
as memory of the process until the kernel reclaims them. ``safe_open`` of safetensors reads only
whole rows, but a ZeRO-3 shard may begin inside a row.
"""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from io import FileIO
from math import prod
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sparse_lora_dist.distributed.console import counted
from sparse_lora_dist.errors import UserError
from sparse_lora_dist.system.small_files import parse_json, unique_keys

DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "U8": torch.uint8,
    "I32": torch.int32,
    "I64": torch.int64,
    "BOOL": torch.bool,
}
"""torch dtype by its name in a safetensors header."""
FLOATS = ("BF16", "F16", "F32")
"""Dtypes allowed for weights that are not quantised, by their names in a safetensors header."""
WHOLE = ("U8", "I32", "I64", "BOOL")
"""Dtypes allowed, besides ``FLOATS``, for a buffer that does not hold floating-point numbers."""
CPU = torch.device("cpu")
MAX_HEADER_BYTES = 100_000_000  # the format's own limit

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
"""Names of the one file that holds all weights, and of the list of several files that hold them."""
BLOCK_BYTES = 2**26
"""Number of bytes read at a time for a GPU, through pinned memory. PyTorch never frees pinned
memory, so this bounds its size."""


@dataclass(frozen=True, slots=True)
class Entry:
    """Position, dtype and shape of one tensor in a safetensors file."""

    file: Path
    """Path of the safetensors file."""
    dtype: str
    """Name of the tensor's dtype in the header, such as "BF16"."""
    shape: tuple[int, ...]
    start: int
    """Byte offset of the tensor's first element in the file."""
    nbytes: int
    """Size of the tensor in bytes."""

    @property
    def itemsize(self) -> int:
        return DTYPES[self.dtype].itemsize


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """Where the files hold the elements of one parameter of the model.

    The elements are those of one or more parts, flattened and joined in this order. There are
    several parts, for example, if the files hold a tensor for each expert of a layer.
    """

    keys: tuple[str, ...]
    """Names of the tensors in the files from which the parameter is made."""
    parts: tuple[Entry | bytes, ...]
    """Each part is a tensor in a file, or ``bytes`` with values that no tensor in a file holds,
    such as numbers that bitsandbytes saves as JSON text."""
    dtype: torch.dtype
    """Dtype in which the elements are read; uint8 to read raw bytes, whatever their dtype in the
    files."""

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Shapes of the parts that are tensors in a file."""
        return [p.shape for p in self.parts if isinstance(p, Entry)]

    @property
    def nbytes(self) -> int:
        return sum(len(p) if isinstance(p, bytes) else p.nbytes for p in self.parts)


class CheckpointFiles:
    """Reader of the base files, that is of the safetensors files of a base model's folder.

    The constructor reads the headers and checks them against the sizes of the files. No method is
    collective.

    Args:
        folder: folder with model.safetensors, or with model.safetensors.index.json and the files
            that it names. Where it has both, model.safetensors is read, as transformers does.

    Raises:
        UserError: files are missing, cut short, or not in safetensors format.

    Attributes:
        entries: the tensors in the files, by name.
        passed_over: names of files in the folder that hold other weights and are not read.
        bytes_read: number of bytes of tensors read so far.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bytes_read = 0
        self.entries: dict[str, Entry] = {}
        chosen = _chosen_file(folder)
        self.passed_over = _passed_over(folder, chosen)
        for file in _files_of(chosen):
            own = read_header(file)
            self._check_twice(own)
            self.entries |= own
        if chosen.name.endswith(".json"):
            self._check_index(chosen)
        elif INDEX not in self.passed_over and (folder / INDEX).exists():
            self._check_index(folder / INDEX)

    def _check_twice(self, own: Mapping[str, Entry]) -> None:
        """Raise UserError if a tensor of another file has another value in this file, ``own``."""
        for key in sorted(own.keys() & self.entries.keys()):
            one, other = self.entries[key], own[key]
            alike = (one.dtype, one.shape) == (other.dtype, other.shape)
            parts = zip(self.raw(one, BLOCK_BYTES), self.raw(other, BLOCK_BYTES), strict=False)
            if not alike or not all(torch.equal(a, b) for a, b in parts):
                raise UserError(
                    f"{one.file} and {other.file.name} hold different tensors {key!r}. Which one "
                    "is meant cannot be known. Download the model again."
                )

    def _check_index(self, index: Path) -> None:
        missing = [n for n in parse_json(index.read_bytes())["weight_map"] if n not in self.entries]
        if missing:
            raise UserError(
                f"{index} names {counted(len(missing), 'tensor')} that no file holds. The first is "
                f"{missing[0]!r}. Download the model again."
            )

    def whole(self, key: str) -> Tensor:
        """Read a whole tensor into host memory. It should be small.

        Args:
            key: name of the tensor in the files.

        Returns:
            The flattened tensor, 1-D, on the CPU, in the dtype of the file.
        """
        entry = self.entries[key]
        source = Source(keys=(key,), parts=(entry,), dtype=DTYPES[entry.dtype])
        return self.read(source, 0, entry.nbytes // entry.itemsize)

    def raw(self, entry: Entry, block_bytes: int) -> Iterator[Tensor]:
        """Yield the bytes of a tensor as 1-D uint8 tensors on the CPU.

        Args:
            entry: the tensor to read.
            block_bytes: largest number of bytes to yield at a time.
        """
        source = Source(keys=(), parts=(entry,), dtype=torch.uint8)
        for start in range(0, entry.nbytes, block_bytes):
            yield self.read(source, start, min(start + block_bytes, entry.nbytes))

    def same(self, key: str, other: str, rank: int, ranks: int) -> bool:
        """Return True if two tensors have the same dtype, the same shape, and equal bytes.

        Only one of ``ranks`` equal parts of the bytes is compared, so that the ranks can share the
        work. The tensors are the same if the result is True for each part.

        Args:
            key: name of one tensor in the files.
            other: name of the other tensor.
            rank: index of the part to compare, from 0.
            ranks: number of equal parts that the bytes are divided into.
        """
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
        """Read elements [start, stop) of a flattened source, and no other bytes.

        Args:
            source: where the files hold the parameter to read from.
            start: index of the first element in the flattened parameter.
            stop: index after the last element.
            device: device of the result. When the function returns, a copy to a GPU may still be
                running on the current stream.

        Returns:
            1-D tensor of ``source.dtype`` with ``stop - start`` elements.

        Raises:
            UserError: a file has become unreadable or shorter since it was opened.
        """
        out = torch.empty(max(stop - start, 0), dtype=source.dtype, device=device)
        if device.type == "cpu":
            self._fill(out, source, start)
            return out
        for block in out.split(BLOCK_BYTES // out.element_size()):
            # PyTorch does not reuse the pinned memory before the copy from it has finished.
            pinned = torch.empty_like(block, device=CPU, pin_memory=True)
            self._fill(pinned, source, start)
            block.copy_(pinned, non_blocking=True)
            start += block.numel()
        return out

    def _fill(self, out: Tensor, source: Source, start: int) -> None:
        """Read elements of a parameter into a tensor, until the tensor is full.

        Args:
            out: 1-D tensor in host memory, of ``source.dtype``.
            source: where the files hold the parameter.
            start: index of the first element to read in the flattened parameter.
        """
        first = start * out.element_size()
        last = first + out.nbytes
        buffer = out.view(torch.uint8).numpy().data
        begin = 0  # byte offset of the part in the source
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
            raise UserError(
                f"{part.file} cannot be read any more. Keep the files of the model in place while "
                f"it is loaded. The system reports: {error}"
            ) from error
        self.bytes_read += len(buffer)


def _chosen_file(folder: Path) -> Path:
    """Return the file that transformers would open first: an index, or the only file of weights.

    It is the file that ``transformers_weights`` in config.json names, or else model.safetensors, or
    else model.safetensors.index.json. Another choice would train over other weights than those that
    transformers and PEFT open.

    Raises:
        UserError: the folder has no such file.
    """
    named = _named_in_config(folder)
    if named is not None:
        chosen = folder / named
        inside = folder.absolute() in Path(os.path.abspath(chosen)).parents
        if not inside or not named.endswith((".safetensors", ".safetensors.index.json")):
            raise UserError(
                f"transformers_weights in {folder}/config.json must name a .safetensors file or a "
                f".safetensors.index.json file in that folder, got {named!r}. Correct it."
            )
        if not chosen.is_file():
            raise UserError(
                f"{folder}/config.json names {named} as the file of its weights "
                "(transformers_weights), but there is no such file. Download the model again."
            )
        return chosen
    found = next((folder / name for name in (SINGLE, INDEX) if (folder / name).exists()), None)
    if found is not None:
        return found
    there = sorted(p.name for p in folder.iterdir())[:10] if folder.is_dir() else "no such folder"
    raise UserError(
        f"{folder} holds no model.safetensors and no model.safetensors.index.json "
        f"(found: {there}). Only safetensors files can be loaded. Convert pickled .bin files or "
        "GGUF with transformers: AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)."
    )


def _named_in_config(folder: Path) -> str | None:
    """Return ``transformers_weights`` of config.json; None if it is not there or not text."""
    try:
        named = parse_json((folder / "config.json").read_bytes())["transformers_weights"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return named if isinstance(named, str) else None


def _passed_over(folder: Path, chosen: Path) -> tuple[str, ...]:
    """Return the names of model.safetensors and its index if they lead to other files than
    ``chosen``, the file that is read."""
    others = [folder / n for n in (SINGLE, INDEX) if (folder / n).exists()]
    read = _leads_to(chosen)
    return tuple(p.name for p in others if p != chosen and not _leads_to(p) <= read)


def passed_over_in_words(files: CheckpointFiles) -> str:
    """Return a sentence that names the files that are read, and those that are passed over."""
    read = sorted({entry.file.name for entry in files.entries.values()})
    more = f" and {len(read) - 1} more" if len(read) > 1 else ""
    return (
        f"{files.folder} also has {' and '.join(files.passed_over)}, which may hold other weights. "
        f"Weights are read from {read[0]}{more}, as transformers does. Remove what is not meant"
    )


def _leads_to(file: Path) -> set[Path]:
    try:
        return set(_files_of(file))
    except UserError:  # an index that cannot be read
        return {file}


def _files_of(chosen: Path) -> list[Path]:
    """Return the safetensors files of a model folder.

    Args:
        chosen: the only file of weights, which is returned itself, or an index of several files.

    Raises:
        UserError: files are missing, or the index is not valid.
    """
    if not chosen.name.endswith(".json"):
        return [chosen]
    folder = chosen.parent
    try:
        files = set(parse_json(chosen.read_bytes())["weight_map"].values())
        names = sorted(str(file) for file in files)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{chosen} is not a valid safetensors index ({error}). Download it again."
        ) from error
    absent = [name for name in names if not (folder / name).is_file()]
    if absent:
        raise UserError(
            f"{chosen} names {counted(len(absent), 'file')} that the folder does not have. The "
            f"first is {absent[0]!r}. Download the model again."
        )
    return [folder / name for name in names]


def read_header(file: Path) -> dict[str, Entry]:
    """Read and check the header of one safetensors file.

    Args:
        file: path of the file.

    Returns:
        The tensors in the file, by name.

    Raises:
        UserError: the file is cut short or not in safetensors format: the library safetensors does
            not open it, or its header has a name twice.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or not 0 < length <= min(size - 8, MAX_HEADER_BYTES):
            raise UserError(
                f"{file} is not a safetensors file, or is cut short. It has {size} bytes. Download "
                "it again."
            )
        try:
            header = parse_json(stream.read(length), unique_keys)
            entries = _entries(file, header, data_start=8 + length, size=size)
            # Types, gaps, overlaps, bytes that belong to no tensor: the library looks at the
            # header alone, and it maps the file into memory without reading the tensors.
            with safe_open(file, framework="numpy"):
                return entries
        except (ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
            raise UserError(
                f"{file} has a broken safetensors header ({error}). Download it again."
            ) from error


def _entries(
    file: Path, header: dict[str, dict[str, list[int]]], data_start: int, size: int
) -> dict[str, Entry]:
    """Return the tensors of one file by name, after checking their positions and sizes.

    Args:
        file: path of the file.
        header: decoded header of the file: for each tensor name, its dtype, shape and data_offsets.
        data_start: byte offset in the file from which data_offsets count.
        size: size of the file in bytes.
    """
    entries = {}
    for name, about in header.items():
        if name == "__metadata__":
            continue
        start, stop = about["data_offsets"]
        dtype, shape = str(about["dtype"]), tuple(about["shape"])
        if not all(isinstance(size, int) for size in shape):  # a text times 2^40 takes 1 TB
            raise TypeError(f"tensor {name!r} has the shape {list(shape)}")
        if data_start + stop > size:
            raise UserError(
                f"{file} is cut short. Tensor {name!r} should end at byte {data_start + stop}, but "
                f"the file has only {size} bytes. Download it again."
            )
        nbytes = stop - start
        if dtype in DTYPES and nbytes != prod(shape) * DTYPES[dtype].itemsize:
            raise ValueError(f"tensor {name!r} of shape {list(shape)}, {dtype}, has {nbytes} bytes")
        entries[name] = Entry(
            file=file, dtype=dtype, shape=shape, start=data_start + start, nbytes=nbytes
        )
    return entries


def _read_into(file: FileIO, buffer: memoryview, path: Path) -> None:
    """Fill a buffer from the file's current position.

    It reads in a loop, since one read may return fewer bytes than asked for, on Linux at most 2 GB.

    Args:
        file: the file to read from.
        buffer: memory to fill.
        path: path of the file, for the error message.

    Raises:
        UserError: the file ends before the buffer is full.
    """
    done = 0
    while done < len(buffer):
        got = file.readinto(buffer[done:])
        if not got:
            raise UserError(
                f"{path} ended {len(buffer) - done} bytes early while it was read, so it was "
                "changed after it was opened. Do not change the files while the model is loaded."
            )
        done += got
