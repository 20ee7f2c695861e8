"""Compute random seeds from names and numbers."""

import hashlib


def seed_of(*parts: int | str) -> int:
    """Return a 63-bit seed made from ``parts``, the same on every machine and Python version.

    Args:
        parts: what the seed depends on, e.g. the run's seed and a tensor's name. They are joined
            with "/" and hashed.
    """
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
