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
POINTER, LARGEST_POINTER = b"version https://git-lfs", 1024
"""Beginning of a pointer of git LFS, and its largest size in bytes."""
NEEDLESS = ("consolidated", "README", "LICENSE")
"""Beginnings of the names of files in a folder of a model that no one reads."""


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


def refuse_pointers(*paths: Path) -> None:
    """Raise UserError if one of the files is a pointer of git LFS: a few lines of text that a clone
    without git-lfs has in place of a large file.

    Args:
        paths: paths of files. What is no file is not refused.
    """
    for path in paths:
        if path.is_file() and path.stat().st_size < LARGEST_POINTER:
            if path.read_bytes().startswith(POINTER):
                raise UserError(
                    f"{path} is a pointer of git LFS, and not the file itself. Get the file with "
                    "git lfs pull, or download it again."
                )


def refuse_pointers_in(folder: Path) -> None:
    """Raise UserError if a file in a folder, of a kind that is read, is a pointer of git LFS.

    Args:
        folder: folder of a model or an adapter. It need not exist.
    """
    kinds = tuple(kind for kind in READ if kind != ".model")  # often beside the tokenizer.json
    with suppress(FileNotFoundError, NotADirectoryError):
        names = (path.name for path in sorted(folder.iterdir()) if path.name.endswith(kinds))
        refuse_pointers(*(folder / name for name in names if not name.startswith(NEEDLESS)))


def refuse_nul_bytes(path: Path) -> None:
    """Raise UserError if a text file holds NUL bytes, as after a crash, or in UTF-16.

    Args:
        path: path of the file, of any size. It is read in parts.
    """
    with path.open("rb") as file:
        before = 0
        while part := file.read(MOST_BYTES):
            lines, nul, _ = part.partition(b"\0")
            before += lines.count(b"\n")
            if nul:
                raise UserError(
                    f"{path}:{before + 1}: This line has NUL bytes, which no text has: the file "
                    "was damaged, as by a crash while it was written, or it is not UTF-8 text. "
                    "Make it again, or save it as UTF-8 text."
                )


def whole_text(path: Path, place: str) -> str:
    """Return the text of a file that a user names, such as a chat template.

    Args:
        path: path of the file.
        place: text with which a message begins, e.g. "--chat_template a.jinja".

    Raises:
        UserError: it cannot be read, is a pointer of git LFS, or is not UTF-8 text.
    """
    try:
        refuse_pointers(path)
        refuse_nul_bytes(path)
        return path.read_text(encoding="utf-8-sig")  # an editor may put a mark of UTF-8 before it
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{place} cannot be read: {error}. Give a UTF-8 text file.") from error


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


def is_json(text: str) -> bool:
    """Return True if a text is a JSON object or list."""
    try:
        return isinstance(parse_json(text), dict | list)
    except ValueError:
        return False


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
