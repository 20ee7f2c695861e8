"""Check that all nodes have the same base model.

The check compares the headers of the files and samples of every tensor. Two revisions of a model
may have the same headers, and reading all weights would take as long as loading them.
"""

import hashlib
from collections.abc import Iterator
from functools import lru_cache
from itertools import groupby
from pathlib import Path

from sparse_lora_dist.base_model.architecture import identity
from sparse_lora_dist.base_model.safetensors_reader import CheckpointFiles
from sparse_lora_dist.distributed import comm
from sparse_lora_dist.distributed.phases import fail_together
from sparse_lora_dist.errors import UserError

SAMPLES, SAMPLE_BYTES = 8, 256
"""Number of samples of each tensor (fewer if it is small), and number of bytes of a sample."""


def check_same_on_all_nodes(name: str, folder: Path, files: CheckpointFiles) -> None:
    """Raise UserError if a node's copy of the model differs from rank 0's. Collective.

    One rank of each node reads the files of its node.

    Args:
        name: value of ``--model``, used in the message.
        folder: the model folder on this node.
        files: the opened base files of that folder.

    Raises:
        UserError: a node's copy differs from that of rank 0.
    """
    own = None
    with fail_together("comparing the base model of all nodes"):
        if comm.rank() == 0 or comm.is_first_on_its_node():
            own = (identity(folder, files), hash_of_samples(files))
    hashes = comm.gather_objects(own)
    other = next((r for r, found in enumerate(hashes) if found not in (None, hashes[0])), None)
    if other is not None:
        raise UserError(
            f"Not all nodes have the same files of --model {name}: rank {other} has other files in "
            f"{folder} than rank 0. If the model is a hub id, set --revision. Otherwise copy the "
            "same folder to every machine.",
            shared=True,
        )


@lru_cache(maxsize=1)  # also used for the base cache; it takes thousands of small reads
def hash_of_samples(files: CheckpointFiles) -> str:
    """Return a SHA-256 hash, in hex, of a few samples of every tensor. Not collective."""
    digest = hashlib.sha256()
    in_order = sorted(files.entries.values(), key=lambda e: (e.file, e.start))
    for file, entries in groupby(in_order, key=lambda e: e.file):
        with file.open("rb", buffering=0) as stream:
            for entry in entries:
                for offset in _places(entry.nbytes):
                    stream.seek(entry.start + offset)
                    digest.update(stream.read(min(SAMPLE_BYTES, entry.nbytes)))
    return digest.hexdigest()


def _places(num_bytes: int) -> Iterator[int]:
    """Yield the byte offsets of a tensor's samples, spread evenly over its ``num_bytes`` bytes."""
    last = max(num_bytes - SAMPLE_BYTES, 0)
    yield from sorted({last * i // (SAMPLES - 1) for i in range(SAMPLES)})
