"""Seeds from names."""

import hashlib


def seed_of(*parts: int | str) -> int:
    """A 63-bit seed from anything printable, the same on every machine."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
