"""Write and read JSON Lines files, which have one JSON object (a record) per line. A resumed run
appends to the files of its run folder."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparse_lora_dist.distributed import comm
from sparse_lora_dist.distributed.console import print_line
from sparse_lora_dist.system.atomic_files import write_whole

Record = Mapping[str, float | int | str]
"""One line of ``metrics.jsonl`` as a dict: numbers or texts by name, among them ``step``, the
optimizer step after which they were measured."""


class JsonLines:
    """File with one JSON object (a record) per line, each with the key ``step``, an optimizer step.

    Only rank 0 writes; on other ranks the methods do nothing. Not a collective.
    """

    def __init__(self, path: Path, *, last_step: int | None) -> None:
        """Remove the records of the steps that a resumed run makes again.

        Args:
            path: the file. It need not exist, and is created with the first record.
            last_step: step that a resumed run starts from; records of later steps are removed. None
                removes all records.
        """
        self.path, self._failed = path, False
        if comm.rank() == 0 and path.exists():
            records = [
                r for r in read_records(path) if last_step is not None and r["step"] <= last_step
            ]
            write_whole(path, "".join(json.dumps(record) + "\n" for record in records))

    def append(self, record: Mapping[str, Any]) -> None:
        """Append one record. Values that JSON does not have, nan and infinity, become null.

        The first write error is printed as a warning, and later records are dropped. It does not
        end the run, because a run can do without its metrics.

        Args:
            record: JSON values by name, with the key ``step``.
        """
        if comm.rank() > 0 or self._failed:
            return
        finite = {k: v if _is_json(v) else None for k, v in record.items()}
        try:
            with self.path.open("a") as file:
                file.write(json.dumps(finite) + "\n")
        except OSError as error:
            self._failed = True
            print_line(
                "warning",
                f"{self.path} cannot be written: {error}. The run goes on without the records from "
                f"step {record['step']} on.",
            )


def _is_json(value: object) -> bool:
    return not isinstance(value, float) or math.isfinite(value)


def read_records(path: Path) -> list[dict[str, Any]]:
    """Read a JSON Lines file. Reading ends at the first line that is not JSON, which is usually the
    last line of the file, cut short by a crash.

    Args:
        path: the file, with one JSON object per line.

    Returns:
        One dict for each line, in the order of the file.

    Raises:
        OSError: the file cannot be read.
    """
    records = []
    for line in path.read_text().splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records
