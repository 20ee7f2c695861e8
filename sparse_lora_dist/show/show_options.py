"""Options of launcher/show.py."""

from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sparse_lora_dist.config.paths import path_argument
from sparse_lora_dist.config.sections import RunConfig
from sparse_lora_dist.system.program_names import as_started_here


@dataclass(frozen=True, kw_only=True)
class ShowRequest:
    """What launcher/show.py was asked for: the folder to show."""

    path: Path
    """Folder of a PEFT adapter or of a checkpoint."""
    run: RunConfig = field(default_factory=RunConfig)
    """Options of the section ``run`` at their defaults; ``run_program`` reads ``debug`` from
    them."""


def load_request(argv: Sequence[str]) -> ShowRequest:
    """Read the program's command line; exit with status 2 and a message if it is wrong.

    Args:
        argv: the words of the command line after the program's name.
    """
    return ShowRequest(path=build_parser().parse_args(argv).path)


def build_parser() -> ArgumentParser:
    """Return the parser of launcher/show.py's command line."""
    parser = ArgumentParser(
        prog=as_started_here("launcher/show.py"),
        description="Show what an adapter or a checkpoint holds, as a table.",
    )
    parser.add_argument(
        "path",
        metavar="ADAPTER_OR_CHECKPOINT",
        type=path_argument,
        help="Folder of a PEFT adapter or of a checkpoint.",
    )
    return parser
