"""Options of launcher/show.py."""

from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sparse_lora_dist.config.sections import RunConfig


@dataclass(frozen=True, kw_only=True)
class ShowRequest:
    """What launcher/show.py was asked for: the folder to show."""

    path: Path
    """Folder of a PEFT adapter or of a checkpoint."""
    run: RunConfig = field(default_factory=RunConfig)
    """Options that ``run_program`` reads (--debug)."""


def load_request(argv: Sequence[str]) -> ShowRequest:
    """Return what the command line asks for; exit with status 2 if an option is wrong.

    Args:
        argv: The words after the program's name.
    """
    return ShowRequest(path=build_parser().parse_args(argv).path)


def build_parser() -> ArgumentParser:
    """Return the parser of launcher/show.py's command line."""
    parser = ArgumentParser(
        prog="launcher/show.py",
        description="Show what an adapter or a checkpoint holds, as a table.",
    )
    parser.add_argument(
        "path",
        metavar="ADAPTER_OR_CHECKPOINT",
        type=Path,
        help="Folder of a PEFT adapter or of a checkpoint.",
    )
    return parser
