"""Hash the contents of a data set, whatever its name and date."""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from sparse_lora_dist.data.read_files import SUFFIXES
from sparse_lora_dist.data.tokens import Documents, identity

MOST_DOCUMENTS = 4096
"""Number of documents whose tokens are hashed; of more, as many evenly spread ones."""
WHOLE_FILES, BLOCKS, BLOCK_BYTES = 2**26, 64, 2**20
"""Bytes of all files together up to which they are hashed as a whole; number of evenly spread
blocks that are hashed of more, over all files (at least two of a file); bytes of a block."""


def hash_of_tokenizer(tokenizer: PreTrainedTokenizerFast) -> str:
    """Return a SHA-256 hash, in hex, of a tokenizer. Tokenizers that give different tokens have
    different ones."""
    return hashlib.sha256("\n".join(identity(tokenizer)).encode()).hexdigest()


def hash_of_documents(documents: Documents) -> str:
    """Return a hash of the number of tokens of every document, and of the token ids and labels of
    at most ``MOST_DOCUMENTS`` documents.

    Returns:
        "all N documents, sha256 HEX", or "N of M documents, sha256 HEX" if not all were hashed.
    """
    digest = hashlib.sha256(documents.lengths.tobytes())
    count = len(documents)
    places = _spread(count, MOST_DOCUMENTS)
    for ids, labels in documents.tokens_and_labels(places):
        digest.update(ids.tobytes() + labels.tobytes())
    hashed = "all" if len(places) == count else f"{len(places)} of"
    return f"{hashed} {count} documents, sha256 {digest.hexdigest()}"


def hash_of_examples(examples: Iterable[Mapping[str, Any]]) -> str:
    """Return a SHA-256 hash, in hex, of all columns of all examples.

    Args:
        examples: the examples in the order of the data, each as {column: value}.
    """
    digest = hashlib.sha256()
    for example in examples:
        digest.update(json.dumps(example, sort_keys=True, default=_in_words).encode())
    return digest.hexdigest()


def _in_words(value: object) -> str:
    """Return the text of a value that JSON does not have, without its place in memory."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


def hash_of_files(source: str) -> str | None:
    """Return a SHA-256 hash, in hex, of the sizes and contents of the files of a data set; if they
    are larger than ``WHOLE_FILES``, of samples.

    Args:
        source: file, folder or hub id.

    Returns:
        The hash; None for a hub id.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES and p.is_file())
    elif path.is_file():
        files = [path]
    else:
        return None
    total = sum(file.stat().st_size for file in files)
    blocks = max(2, BLOCKS // max(len(files), 1)) if total > WHOLE_FILES else None
    digest = hashlib.sha256()
    for file in files:
        digest.update(_hash_of_file(file, blocks))
    return digest.hexdigest()


def _hash_of_file(path: Path, blocks: int | None) -> bytes:
    """Return the hash of a file's size and of ``blocks`` blocks of it; None: of all of it."""
    size = path.stat().st_size
    whole = blocks is None or size <= blocks * BLOCK_BYTES
    starts = [0] if whole else _spread(size - BLOCK_BYTES + 1, blocks or 0)
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for start in starts:
            file.seek(start)
            digest.update(file.read(size if whole else BLOCK_BYTES))
    return digest.digest()


def _spread(count: int, most: int) -> list[int]:
    """Return at most ``most`` of the numbers 0 to count - 1, evenly spread, with both ends."""
    if count <= most:
        return list(range(count))
    return [(count - 1) * i // (most - 1) for i in range(most)]
