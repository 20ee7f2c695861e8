"""Options of launcher/report.py."""

from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sparse_lora_dist.config.paths import path_argument
from sparse_lora_dist.config.sections import RunConfig
from sparse_lora_dist.system.program_names import as_started_here


@dataclass(frozen=True, kw_only=True)
class ReportRequest:
    """What launcher/report.py was asked for: the runs to report on, and the files to write."""

    runs: tuple[Path, ...]
    """Run folders, at least one."""
    output: Path
    """HTML file to write."""
    png: bool
    """True: each figure is written to a PNG file too."""
    run: RunConfig = field(default_factory=RunConfig)
    """Options at their defaults. The program reads only ``debug`` (tracebacks in error messages),
    as ``run_program`` does for every program."""


def load_request(argv: Sequence[str]) -> ReportRequest:
    """Read the report's command line; exit with status 2 and a message if an option is wrong.

    Args:
        argv: the words of the command line after the program's name.

    Returns:
        The run folders and the files to write; the page's default is report.html in the first run
        folder.
    """
    found = build_parser().parse_args(argv)
    output = found.output or found.runs[0] / "report.html"
    return ReportRequest(runs=tuple(found.runs), output=output, png=found.png)


def build_parser() -> ArgumentParser:
    """Return the parser of launcher/report.py's command line."""
    parser = ArgumentParser(
        prog=as_started_here("launcher/report.py"),
        description="Report what a run did on one HTML page, or compare several runs.",
        allow_abbrev=False,
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", type=path_argument, help="Run folder.")
    parser.add_argument(
        "--output",
        metavar="FILE",
        type=path_argument,
        help="HTML file to write. Default: RUN/report.html.",
    )
    parser.add_argument(
        "--png", action="store_true", help="Write each figure to a PNG file next to the page too."
    )
    return parser
