"""Reads the published KnowEdit files with ``launcher/edit.py --only_read``.

    python benchmarks/edit_files.py FOLDER

FOLDER, or zsre/ in the folder of ``make bench DATA=``, holds KnowEdit's JSON files.
"""

import subprocess
import sys
from pathlib import Path

from _job import ROOT, data_folder, write


def main() -> None:
    """A row a file."""
    folder = data_folder("zsre", "holds KnowEdit's JSON files")
    if folder is None:
        return
    rows = [f"| {file.name} | {what_it_says(file)} |" for file in sorted(folder.glob("*.json"))]
    lines = ["`python benchmarks/edit_files.py FOLDER`: what `launcher/edit.py --only_read` says."]
    write("edit_files.md", "\n".join([*lines, "", "| file | holds |", "|---|---|", *rows]))


def what_it_says(file: Path) -> str:
    """The program's one line; it ends otherwise where the file has a fault."""
    command = [sys.executable, "launcher/edit.py", "--edits", str(file), "--only_read"]
    return subprocess.run(
        command, cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.strip()


if __name__ == "__main__":
    main()
