"""Read small files that a user names, such as files of options, with bounds on size and nesting."""

import json
import os
import select
import stat
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

MOST_BYTES = 2**20
"""Largest size of such a file."""
PATIENCE_S = 10.0
"""Longest time in seconds that a pipe may take to deliver its text."""


def text_of(path: str | Path) -> str:
    """Return the text of a small file.

    A pipe, such as bash's ``<(...)``, can be read only once, so its text is remembered: later calls
    in this process return the same text.

    Args:
        path: path of the file or pipe.

    Raises:
        OSError: it cannot be read, is larger than ``MOST_BYTES``, or is a pipe through which
            nothing comes.
        ValueError: it is not UTF-8 text (UnicodeDecodeError), or the path has a NUL character.
    """
    if stat.S_ISREG(os.stat(path).st_mode):
        with open(path, "rb") as file:
            content = file.read(MOST_BYTES + 1)
    else:
        content = _of_pipe(str(path))
    if len(content) > MOST_BYTES:
        raise OSError(f"it is larger than {MOST_BYTES} bytes")
    return content.decode("utf-8-sig")


@cache
def _of_pipe(path: str) -> bytes:
    # Not blocking: a pipe to which nobody writes would be waited for without end.
    pipe = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        content, deadline = b"", time.monotonic() + PATIENCE_S
        while len(content) <= MOST_BYTES:
            ready, _, _ = select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise OSError(f"it is a pipe that did not end within {PATIENCE_S:.0f} s")
            part = os.read(pipe, MOST_BYTES)
            if not part:
                break
            content += part
        return content
    finally:
        os.close(pipe)


def parse_json(
    text: str | bytes,
    hook: Callable[[list[tuple[str, Any]]], Any] | None = None,
    *,
    constant: Callable[[str], Any] | None = None,
) -> Any:
    """Return the value of a JSON text.

    Args:
        text: the JSON text.
        hook: ``object_pairs_hook`` of ``json.loads``.
        constant: ``parse_constant`` of ``json.loads``: takes "NaN", "Infinity" or "-Infinity".

    Raises:
        ValueError: it is not JSON (json.JSONDecodeError), is nested too deep, or has a number of
            thousands of digits. No other exception is raised.
    """
    try:
        return json.loads(text, object_pairs_hook=hook, parse_constant=constant)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object as a dict. Pass it to ``json.loads`` as ``object_pairs_hook``:
    without it the last of several values counts.

    Args:
        pairs: keys and values of the object in their order.

    Raises:
        ValueError: a key is there several times.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"an object has the key {twice!r} several times")
    return found
