"""Options of launcher/show.py."""

from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sparse_lora_dist.config.sections import RunConfig


@dataclass(frozen=True, kw_only=True)
class ShowRequest:
    """The folder to show."""

    path: Path
    run: RunConfig = field(default_factory=RunConfig)


def load_request(argv: Sequence[str]) -> ShowRequest:
    """Read the command line; a wrong option exits with status 2.

    Args:
        argv: the words after the program's name.
    """
    return ShowRequest(path=build_parser().parse_args(argv).path)


def build_parser() -> ArgumentParser:
    """Build the parser of launcher/show.py."""
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
