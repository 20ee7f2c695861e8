"""Tell a page that this program wrote, and nobody has changed since, from any other file.

The head of a page has a line with a SHA-256 hash of the rest of the page.
"""

import hashlib
import re
from pathlib import Path

from sparse_lora_dist.errors import UserError

GENERATOR = "sparse_lora_dist report"
"""Text that marks every page and PNG file that this program writes."""
MARK = f'<meta name="generator" content="{GENERATOR}">\n'
"""Line in the head of every page. The line with the hash follows it."""
SEAL = re.compile(rb'<meta name="sha256" content="([0-9a-f]{64})">\n')
HEAD_BYTES = 1000
"""Number of bytes at the beginning of a page that hold its mark and its hash."""


def seal(page: str) -> str:
    """Return a page with a hash of itself in its head.

    Args:
        page: the HTML of the page, with the line ``MARK``.
    """
    digest = hashlib.sha256(page.encode()).hexdigest()
    return page.replace(MARK, f'{MARK}<meta name="sha256" content="{digest}">\n', 1)


def is_own_page(content: bytes) -> bool:
    """Return True if this program wrote a page and nobody has changed it since.

    Of pages without a hash, as versions before wrote them, the mark alone counts.

    Args:
        content: the bytes of the file.
    """
    head = content[:HEAD_BYTES]
    if MARK.encode() not in head:
        return False
    found = SEAL.search(head)
    if found is None:
        return True
    rest = content[: found.start()] + content[found.end() :]
    return hashlib.sha256(rest).hexdigest().encode() == found[1]


def check_replaceable(path: Path) -> None:
    """Raise UserError if there is a file that ``--output`` must not replace.

    Only a page that this program wrote is replaced, and only as it was written.

    Args:
        path: value of ``--output``; it is no folder.
    """
    if path.is_symlink():
        raise UserError(
            f"--output {path} is a link, and a report would replace it. Give the path that it "
            "leads to, or another --output."
        )
    if path.exists() and not is_own_page(path.read_bytes()):
        raise UserError(
            f"--output {path} is not a report of this program, or was changed after it was "
            "written, so it is not replaced. Choose another --output, or remove it."
        )
