"""Copy the files to start from: ``sparse-lora-examples FOLDER``.

An installed package has no launcher/, configs/, ds_configs/ and slurm/ beside it. In a copy of them
every command of the documentation works as in a clone, and the files can be edited.
"""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from os.path import lexists
from pathlib import Path

from sparse_lora_dist.config.load import print_and_exit
from sparse_lora_dist.config.paths import bad_path, expanded
from sparse_lora_dist.config.sections import RunConfig
from sparse_lora_dist.errors import UserError
from sparse_lora_dist.system.shipped import SHIPPED

FOLDERS = ("configs", "ds_configs", "launcher", "slurm")
USAGE = """usage: sparse-lora-examples FOLDER
Copies configs/, ds_configs/, launcher/ and slurm/ into FOLDER, which is made if it does not exist.
Nothing is replaced."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """Where the files are to be copied to."""

    folder: Path
    run: RunConfig = field(default_factory=RunConfig)
    """Options that ``run_program`` reads (--debug)."""


def load_request(argv: Sequence[str]) -> Request:
    """Read the program's command line.

    Raises:
        UserError: it is not one folder, or one of the folders to copy exists there.
    """
    if tuple(argv) in (("--help",), ("-h",)):
        print_and_exit(USAGE)
    if len(argv) != 1 or argv[0].startswith("-") or not argv[0].strip():
        raise UserError(USAGE)
    if problems := bad_path("FOLDER", argv[0]):
        raise UserError(f"{problems[0]}.")
    folder = Path(expanded(argv[0]))
    if there := [name for name in FOLDERS if lexists(folder / name)]:
        raise UserError(
            f"{folder} holds {', '.join(there)} already, and nothing is replaced. Name another "
            "folder."
        )
    return Request(folder=folder)


def copy(request: Request) -> None:
    """Copy the folders.

    Raises:
        UserError: they cannot be written.
    """
    try:
        for file in (file for name in FOLDERS for file in (SHIPPED / name).rglob("*")):
            target = request.folder / file.relative_to(SHIPPED)
            if file.is_file() and "__pycache__" not in file.parts:
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, target)  # its mode follows the umask, not that of the package
    except OSError as error:
        raise UserError(f"{request.folder} cannot be written: {error}. Name another.") from error
    print(f"examples  {', '.join(f'{name}/' for name in FOLDERS)} are in {request.folder}")


if __name__ == "__main__":
    from sparse_lora_dist.programs import examples

    examples()
