"""Do all nodes have the same base model? What is compared are headers, and samples of every tensor:
two revisions of a model have the same headers, and to read all would take as long as to load it."""

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


def check_same_on_all_nodes(name: str, folder: Path, files: CheckpointFiles) -> None:
    """Raise where a node's copy of the model is another one. Collective."""
    own = None
    with fail_together("comparing the base model of all nodes"):
        if comm.rank() == 0 or comm.is_first_on_its_node():
            own = (identity(folder, files), hash_of_samples(files))
    said = comm.gather_objects(own)
    other = next((r for r, found in enumerate(said) if found not in (None, said[0])), None)
    if other is not None:
        raise UserError(
            f"--model {name}: rank {other} has other files in its {folder} than rank 0. Give "
            "--revision for a hub id, or copy the same folder to every machine.",
            shared=True,
        )


@lru_cache(maxsize=1)  # the base cache asks again, and thousands of small reads take their time
def hash_of_samples(files: CheckpointFiles) -> str:
    """Of a few places of every tensor."""
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
    """Where samples begin: from the first byte to the last, evenly."""
    last = max(num_bytes - SAMPLE_BYTES, 0)
    yield from sorted({last * i // (SAMPLES - 1) for i in range(SAMPLES)})
