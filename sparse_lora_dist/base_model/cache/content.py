"""Hash the bytes of a base cache, check them before they are loaded, and see who may change them.

A cache may lie for years on a disk that several people share. The hashes are in base_cache.json,
one for each block of each file, so that ranks can check different blocks at the same time.
"""

import hashlib
import os
import pwd
import stat
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

BLOCK_BYTES = 2**25
"""Number of bytes of a file that one hash covers."""
READ_BYTES = 2**20
"""Number of bytes that are in memory at a time."""
THREADS = 4
"""Number of blocks that are hashed at the same time when a cache is written."""


def hashes_of(place: Path) -> dict[str, list[str]]:
    """Return file name -> SHA-256 hashes of the blocks of the file, for all files of a cache.

    Args:
        place: folder of the cache, which is complete but for base_cache.json.
    """
    found = {}
    with ThreadPoolExecutor(THREADS) as threads:
        for path in sorted(place.iterdir()):
            starts = range(0, path.stat().st_size, BLOCK_BYTES)
            found[path.name] = list(threads.map(lambda s, p=path: _hash(p, s), starts))
    return found


def find_damage(place: Path, hashes: Mapping[str, Any], share: int, shares: int) -> str | None:
    """Check the size of every file of a cache, and the hashes of one share of the blocks.

    Not collective. The cache is intact if this returns None for every share.

    Args:
        place: folder of the cache.
        hashes: what ``hashes_of`` returned when the cache was written.
        share: which blocks to check: ``share``, ``share + shares``, ``share + 2 * shares`` ...
        shares: number of shares.

    Returns:
        Sentence that names the first damaged file; None if none was found.
    """
    for number, (path, start, wanted) in enumerate(_blocks(place, hashes)):
        if wanted is None:
            return f"{path} has another size than when the cache was written."
        if number % shares == share and _hash(path, start) != wanted:
            return f"{path} was altered after the cache was written: its hash does not match."
    return None


def _blocks(place: Path, hashes: Mapping[str, Any]) -> Iterator[tuple[Path, int, str | None]]:
    """Yield (file, first byte, hash) of each block; the hash is None if the file has another number
    of blocks."""
    for name, blocks in sorted(hashes.items()):
        starts = range(0, (place / name).stat().st_size, BLOCK_BYTES)
        if len(starts) != len(blocks):
            yield place / name, 0, None
        for start, wanted in zip(starts, blocks, strict=False):
            yield place / name, start, wanted


def _hash(path: Path, start: int) -> str:
    digest, left = hashlib.sha256(), BLOCK_BYTES
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        while left and (read := file.read(min(left, READ_BYTES))):
            digest.update(read)
            left -= len(read)
    return digest.hexdigest()


def who_else_can_write(place: Path) -> str | None:
    """Return who, besides this user and root, can change a cache, as a phrase for messages.

    Args:
        place: folder of the cache.

    Returns:
        Phrase that names the first such file and its owner or mode, to be followed by what they can
        do; None if nobody else can.
    """
    for path in (place, *sorted(place.iterdir())):
        about = path.stat()
        if about.st_uid not in (0, os.getuid()):
            return f"{path} belongs to {_name(about.st_uid)}, who"
        everyone = about.st_mode & stat.S_IWOTH
        group = about.st_mode & stat.S_IWGRP and about.st_gid != os.getgid()
        if everyone or group:
            mode = stat.S_IMODE(about.st_mode)
            return f"{path} has mode {mode:o}: {'everyone' if everyone else 'its group'}"
    return None


def _name(uid: int) -> str:
    try:
        return f"user {pwd.getpwuid(uid).pw_name}"
    except KeyError:
        return f"user {uid}"
