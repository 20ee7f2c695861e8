"""What launcher/report.py is asked for."""

from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sparse_lora_dist.config.sections import RunConfig


@dataclass(frozen=True, kw_only=True)
class ReportRequest:
    """Runs, and where their report goes."""

    runs: tuple[Path, ...]
    output: Path
    png: bool
    run: RunConfig = field(default_factory=RunConfig)


def load_request(argv: Sequence[str]) -> ReportRequest:
    """What ``argv`` asks; a wrong one ends the program with status 2."""
    parser = ArgumentParser(
        prog="launcher/report.py",
        description="What a run did, on one page; several runs are compared.",
        allow_abbrev=False,
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="folder of a run")
    parser.add_argument("--output", metavar="FILE", type=Path, help="page; default RUN/report.html")
    parser.add_argument("--png", action="store_true", help="figures as files too, beside the page")
    found = parser.parse_args(argv)
    output = found.output or found.runs[0] / "report.html"
    return ReportRequest(runs=tuple(found.runs), output=output, png=found.png)
