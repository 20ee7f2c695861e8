"""Runs the parts of ``gpu_check.py``, each in a process of its own, within a limit of seconds.

What a part finds is appended to a file of JSON lines the moment it is known, so that it stays
whatever ends the process. The last record of a part says how it ended:

    {"part": "8B", "ended": "ok", "seconds": 61.2}
    {"part": "8B", "ended": "failed", "why": "status 1", ...}    another record has the traceback
    {"part": "8B", "ended": "limit", "why": "more than 120 s", ...}
    {"part": "8B", "ended": "left out", "why": "..."}

A later call does only what has not ended with "ok".
"""

import importlib
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

Row = dict[str, Any]
Note = Callable[..., None]
"""``note(name=value, ...)`` appends a record of the part that calls it."""
LONGEST_ERROR = 6000
"""Characters of a traceback that are kept, from its end."""
SLOWER = 10
"""Times the limits, which are a GPU's, on a CPU: it may be busy."""
NEEDS_GPU = "skipped: needs a GPU"


@dataclass(frozen=True, kw_only=True)
class Part:
    """What one process does: call ``work``, "module:function", as ``work(note, tiny=...,
    **arguments)``."""

    name: str
    work: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    usual_s: float = 0.0
    """Seconds that it is expected to take on a GPU; with fewer left it is not begun."""
    limit_s: float
    needs_gpu: bool = False


class Record:
    """A file of records, and the log beside it, which has what the parts print."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.log = file.with_name("log.txt")
        self.screen = 1
        file.parent.mkdir(parents=True, exist_ok=True)

    def append(self, part: str, **found: Any) -> None:
        """Append a record in one write, and print it."""
        line = json.dumps({"part": part, **found}) + "\n"
        with self.file.open("a") as stream:
            stream.write(line)
        os.write(self.screen, line.encode())

    def rows(self) -> list[Row]:
        """Return all whole records."""
        lines = self.file.read_text().splitlines() if self.file.exists() else []
        return [json.loads(line) for line in lines if line.endswith("}")]

    def done(self) -> set[str]:
        """Return the names of the parts that ended rightly."""
        ends = {row["part"]: row["ended"] for row in self.rows() if "ended" in row}
        return {part for part, ended in ends.items() if ended == "ok"}


def run_parts(
    parts: Sequence[Part],
    record: Record,
    context: BaseContext,
    *,
    gpu: bool,
    tiny: bool = False,
    done: Collection[str] = (),
    budget_s: float = float("inf"),
) -> None:
    """Run the parts one after another, and append how each ended.

    Args:
        parts: what to do, in this order.
        record: where results go.
        context: starts processes. On a GPU it must not fork: CUDA does not survive that.
        gpu: whether there is a GPU.
        tiny: passed to the parts: shapes of a toy.
        done: names of parts to pass over without a word in the record.
        budget_s: seconds for all parts. One that is expected to take longer than what is left of
            them is left out, and the limit of one that is begun is at most what is left.
    """
    began = time.monotonic()
    for part in parts:
        left = budget_s - (time.monotonic() - began)
        if part.name in done:
            print(f"{part.name}: done before", flush=True)
        elif part.needs_gpu and not gpu:
            record.append(part.name, ended="left out", why=NEEDS_GPU)
        elif left < part.usual_s or left <= 0:
            why = f"{left:.0f} s are left, and it takes about {part.usual_s:.0f} s"
            record.append(part.name, ended="left out", why=why)
        else:
            limit_s = part.limit_s * (SLOWER if tiny and not gpu else 1)
            _run(part, record, context, tiny=tiny, limit_s=min(limit_s, left))


def _run(part: Part, record: Record, context: BaseContext, *, tiny: bool, limit_s: float) -> None:
    """Run one part to its end or its limit."""
    started = time.monotonic()
    process = context.Process(target=work, args=(part, record.file, tiny))  # type: ignore[attr-defined]
    process.start()
    process.join(limit_s)
    late = process.is_alive()
    _kill(process)
    seconds = round(time.monotonic() - started, 1)
    if late:
        record.append(part.name, ended="limit", why=f"more than {limit_s:.0f} s", seconds=seconds)
    elif process.exitcode:
        why = f"status {process.exitcode}"
        record.append(part.name, ended="failed", why=why, seconds=seconds)
    else:
        record.append(part.name, ended="ok", seconds=seconds)


def _kill(process: Any) -> None:
    """Kill a part, if it runs, and all that it started and left: it leads a process group."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()  # one that has not come so far
    process.join()


def work(part: Part, file: Path, tiny: bool) -> None:
    """The process of a part. It ends without Python's clean-up, which may wait for a device."""
    os.setsid()
    record = Record(file)
    record.screen = os.dup(1)
    print_into(record.log)
    note, status = partial(record.append, part.name), 0
    try:
        module, name = part.work.split(":")
        getattr(importlib.import_module(module), name)(note, tiny=tiny, **part.arguments)
    except BaseException:
        note(error=traceback.format_exc()[-LONGEST_ERROR:])
        status = 1
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(status)


def print_into(log: Path) -> None:
    """Let this process and those that it starts print into a file."""
    with log.open("a") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
