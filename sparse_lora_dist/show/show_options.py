"""What launcher/show.py is asked for."""

from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sparse_lora_dist.config.sections import RunConfig


@dataclass(frozen=True, kw_only=True)
class ShowRequest:
    """A folder."""

    path: Path
    run: RunConfig = field(default_factory=RunConfig)


def load_request(argv: Sequence[str]) -> ShowRequest:
    """What ``argv`` asks; a wrong one ends the program with status 2."""
    parser = ArgumentParser(
        prog="launcher/show.py", description="What is in an adapter or a checkpoint, as a table."
    )
    parser.add_argument(
        "path", metavar="ADAPTER_OR_CHECKPOINT", type=Path, help="folder of either, on disk"
    )
    return ShowRequest(path=parser.parse_args(argv).path)
