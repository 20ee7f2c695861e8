"""Read small files that a user names, such as files of options, with bounds on size and nesting,
and refuse pipes and devices in place of files."""

import json
import os
import select
import stat
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from sparse_lora_dist.errors import UserError

MOST_BYTES = 2**20
"""Largest size of such a file."""
READ = (".json", ".jsonl", ".yaml", ".safetensors", ".jinja", ".txt", ".model", ".py")
"""Ends of the names of files that are read in the folder of a model, an adapter or a run."""
PATIENCE_S = 10.0
"""Longest time in seconds that a pipe may take to deliver its text."""


def refuse_pipes(*paths: Path) -> None:
    """Raise UserError if one of the paths is a pipe, a socket or a device.

    Whoever opens a pipe waits until somebody writes to it, which may be never.

    Args:
        paths: paths of files. What is a folder, or does not exist, is not refused.
    """
    for path in paths:
        if is_pipe(path):
            raise UserError(
                f"{path} is a pipe or device, not a file. Put the file itself in its place."
            )


def refuse_pipes_in(folder: Path) -> None:
    """Raise UserError if a file in a folder, of a kind that is read, is a pipe or device.

    Args:
        folder: folder of a model, an adapter, a checkpoint or a run. It need not exist.
    """
    with suppress(FileNotFoundError, NotADirectoryError):
        refuse_pipes(*(path for path in sorted(folder.iterdir()) if path.name.endswith(READ)))


def is_pipe(path: Path) -> bool:
    """Return True if a path is a pipe, a socket or a device, or a link to one."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


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
