"""Hash the contents of a base model, and check that all nodes have the same.

The hashes cover config.json, the headers of the files, and samples of every tensor. Two revisions
of a model may have the same headers, and reading all weights would take as long as loading them.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from pathlib import Path

from sparse_lora_dist.base_model.architecture import hash_of_config, identity
from sparse_lora_dist.base_model.safetensors_reader import CheckpointFiles, Entry
from sparse_lora_dist.distributed import comm
from sparse_lora_dist.distributed.phases import fail_together
from sparse_lora_dist.errors import UserError

SAMPLES, SAMPLE_BYTES = 8, 256
"""Number of samples of each tensor (fewer if it is small), and number of bytes of a sample."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fingerprint:
    """SHA-256 hashes, in hex, of a base model."""

    headers: str
    """config.json, and names, sizes and headers of the files (``architecture.identity``). Another
    copy of the same model may have another one."""
    config: str
    """What config.json says about the model."""
    weights: str
    """Name, dtype, shape and samples of every tensor, however they are spread over files."""


def fingerprint(folder: Path, files: CheckpointFiles) -> Fingerprint:
    """Return the hashes of a base model. Not collective.

    Args:
        folder: the model folder.
        files: the opened base files of that folder.
    """
    return Fingerprint(
        headers=identity(folder, files),
        config=hash_of_config(folder),
        weights=_hashes_of_samples(files)[1],
    )


def check_same_on_all_nodes(name: str, folder: Path, files: CheckpointFiles) -> Fingerprint:
    """Raise UserError if a node's copy of the model differs from rank 0's. Collective.

    One rank of each node reads the files of its node.

    Args:
        name: value of ``--model``, used in the message.
        folder: the model folder on this node.
        files: the opened base files of that folder.

    Returns:
        The hashes of the model.

    Raises:
        UserError: a node's copy differs from that of rank 0.
    """
    own: Fingerprint | None = None
    with fail_together("comparing the base model of all nodes"):
        if comm.rank() == 0 or comm.is_first_on_its_node():
            own = fingerprint(folder, files)
    hashes: list[Fingerprint] = comm.gather_objects(own)
    other = next((r for r, found in enumerate(hashes) if found not in (None, hashes[0])), None)
    if other is not None:
        raise UserError(
            f"Not all nodes have the same files of --model {name}: rank {other} has other files in "
            f"{folder} than rank 0. If the model is a hub id, set --revision. Otherwise copy the "
            "same folder to every machine.",
            shared=True,
        )
    return hashes[0]


def hash_of_samples(files: CheckpointFiles) -> str:
    """Return a SHA-256 hash, in hex, of a few samples of every tensor, in the order of the files.
    Not collective."""
    return _hashes_of_samples(files)[0]


@lru_cache(maxsize=1)  # also used for the base cache; it takes thousands of small reads
def _hashes_of_samples(files: CheckpointFiles) -> tuple[str, str]:
    """Return two SHA-256 hashes of samples of every tensor: in the order of the files, and by name.

    The first names a base cache on disk, so it must not change. The second does not depend on how
    the tensors are spread over files.
    """
    in_order, by_name = hashlib.sha256(), {}
    for name, entry, samples in _samples(files):
        in_order.update(samples)
        about = f"{name} {entry.dtype} {list(entry.shape)} ".encode()
        by_name[name] = hashlib.sha256(about + samples).digest()
    names = sorted(by_name)
    return in_order.hexdigest(), hashlib.sha256(b"".join(by_name[n] for n in names)).hexdigest()


def _samples(files: CheckpointFiles) -> Iterator[tuple[str, Entry, bytes]]:
    """Yield (name, entry, samples joined) of every tensor, in the order of the files."""
    in_order = sorted(files.entries.items(), key=lambda item: (item[1].file, item[1].start))
    for file, items in groupby(in_order, key=lambda item: item[1].file):
        with file.open("rb", buffering=0) as stream:
            for name, entry in items:
                read = bytearray()
                for offset in _places(entry.nbytes):
                    stream.seek(entry.start + offset)
                    read += stream.read(min(SAMPLE_BYTES, entry.nbytes))
                yield name, entry, bytes(read)


def _places(num_bytes: int) -> Iterator[int]:
    """Yield the byte offsets of a tensor's samples, spread evenly over its ``num_bytes`` bytes."""
    last = max(num_bytes - SAMPLE_BYTES, 0)
    yield from sorted({last * i // (SAMPLES - 1) for i in range(SAMPLES)})
