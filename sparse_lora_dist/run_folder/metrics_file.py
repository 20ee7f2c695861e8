"""Write and read JSON Lines files, which have one JSON object (a record) per line. A resumed run
appends to the files of its run folder."""

import json
import math
import os
from codecs import BOM_UTF8
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from sparse_lora_dist.distributed import comm
from sparse_lora_dist.distributed.console import print_line
from sparse_lora_dist.run_folder import lock as run_lock
from sparse_lora_dist.system.atomic_files import write_whole
from sparse_lora_dist.system.own_files import claim, in_short
from sparse_lora_dist.system.small_files import refuse_pipes

Record = Mapping[str, float | int | str]
"""One line of ``metrics.jsonl`` as a dict: numbers or texts by name, among them ``step``, the
optimizer step after which they were measured."""


class JsonLines:
    """File with one JSON object (a record) per line, each with the key ``step``, an optimizer step.

    Only rank 0 writes; on other ranks the methods do nothing. Not a collective.
    """

    def __init__(self, path: Path, *, last_step: int | None) -> None:
        """Remove the records of the steps that a resumed run makes again.

        Lines that are no records stay as they are, and a warning names them. Only the last line, if
        a killed job has written half of it, is removed.

        Args:
            path: the file. It need not exist, and is created with the first record.
            last_step: step that a resumed run starts from; records of later steps are removed. None
                removes all records.
        """
        self.path, self.failed = path, False
        if comm.rank() == 0 and path.exists():
            lines = read_lines(path)
            kept = [line for line in lines if _stays(line, last_step)]
            # A copy made of hard links (cp -al) shares its files with the run that was copied.
            if kept != lines or path.stat().st_nlink > 1:
                write_whole(path, b"".join(line.raw + b"\n" for line in kept))
            _name_foreign(path, kept)

    def append(self, record: Mapping[str, Any]) -> None:
        """Append one record. Values that JSON does not have, nan and infinity, become null.

        The first write error is printed as a warning, and later records are dropped. It does not
        end the run, because a run can do without its metrics.

        Args:
            record: JSON values by name, with the key ``step``.

        Raises:
            HeldError: another job holds the lock of the run folder now.
        """
        if comm.rank() > 0 or self.failed:
            return
        finite = {k: v if _is_json(v) else None for k, v in record.items()}
        try:
            run_lock.check()  # a job that stood still may have lost its folder to another
            if not self.path.exists():
                claim(self.path.parent, self.path.name)
            line = json.dumps(finite) + "\n"
            with self.path.open("ab+") as file:
                file.write(line.encode() if _ends_whole(file) else b"\n" + line.encode())
        except OSError as error:
            self.failed = True
            print_line(
                "warning",
                f"{self.path} cannot be written: {error}. The run goes on without the records from "
                f"step {record['step']} on.",
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """One line of a JSON Lines file."""

    raw: bytes
    """Its bytes, without the line break."""
    record: dict[str, Any] | None
    """What it holds: a JSON object with the key ``step``, a whole number; None for other lines."""
    is_half: bool = False
    """True for the last line of the file if a killed job has written only the first part of it."""


def read_lines(path: Path) -> list[Line]:
    """Read all lines of a JSON Lines file, whatever they hold.

    Raises:
        OSError: the file cannot be read.
        UserError: it is a pipe.
    """
    refuse_pipes(path)
    *whole, last = path.read_bytes().split(b"\n")
    lines = [Line(raw=raw, record=_record(raw)) for raw in whole]
    if last:
        record = _record(last)
        # No part of a record has a line break: b"\r" ends the lines of a file from elsewhere.
        is_half = record is None and last.startswith(b'{"') and b"\r" not in last
        lines.append(Line(raw=last, record=record, is_half=is_half))
    return lines


def read_records(path: Path) -> list[dict[str, Any]]:
    """Read the records of a JSON Lines file. Lines that are no records are left out: damaged ones,
    and JSON without the key ``step``.

    Args:
        path: the file, with one JSON object per line.

    Returns:
        One dict for each record, in the order of the file.

    Raises:
        OSError: the file cannot be read.
    """
    return [line.record for line in read_lines(path) if line.record is not None]


def of_the_same_rows(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return records of ``metrics.jsonl`` whose held-out scores can be compared.

    A resumed run may score another part of the held-out rows (``held_out_rows``). Held-out scores
    of other rows than the last ones are left out; the records themselves stay.
    """
    scored = [record for record in records if "held_out_loss" in record]
    rows = scored[-1].get("held_out_rows") if scored else None
    return [
        {k: v for k, v in record.items() if not k.startswith("held_out_")}
        if "held_out_loss" in record and record.get("held_out_rows") != rows
        else record
        for record in records
    ]


def _record(raw: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(raw.removeprefix(BOM_UTF8))
    except (ValueError, RecursionError):  # bytes that are no UTF-8 are a ValueError too
        return None
    if not isinstance(found, dict) or type(found.get("step")) is not int:
        return None
    return found


def _stays(line: Line, last_step: int | None) -> bool:
    if line.record is None:
        return not line.is_half
    return last_step is not None and line.record["step"] <= last_step


def _ends_whole(file: BinaryIO) -> bool:
    """Return True if a file is empty or ends with a line break."""
    if file.seek(0, os.SEEK_END) == 0:
        return True
    file.seek(-1, os.SEEK_END)
    return file.read(1) == b"\n"


def _name_foreign(path: Path, lines: Sequence[Line]) -> None:
    numbers = [str(n) for n, line in enumerate(lines, start=1) if line.record is None]
    if numbers:
        if len(numbers) == 1:
            what = f"line {numbers[0]} is no record of this run. It stays, and is not read"
        else:
            what = f"lines {in_short(numbers)} are no records of this run. They stay, unread"
        print_line("warning", f"{path}: {what}.")


def _is_json(value: object) -> bool:
    return not isinstance(value, float) or math.isfinite(value)
