"""Program of launcher/report.py: reads run folders and writes the page."""

import os
from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError

from sparse_lora_dist.config.paths import real_path
from sparse_lora_dist.errors import UserError
from sparse_lora_dist.report import curves, ranks
from sparse_lora_dist.report import distributions as spread
from sparse_lora_dist.report.page import GENERATOR, Section, is_own_page, write_page
from sparse_lora_dist.report.report_options import ReportRequest
from sparse_lora_dist.report.run_data import RunData, read_run
from sparse_lora_dist.report.style import save_png
from sparse_lora_dist.report.timeline import timeline
from sparse_lora_dist.system.atomic_files import write_whole
from sparse_lora_dist.system.small_files import is_pipe


def report(request: ReportRequest) -> None:
    """Write the page, and PNG files with ``--png``, and print the state of each run and the paths.

    Args:
        request: the run folders to report on, and the files to write.

    Raises:
        UserError: if a folder is not a run folder, a file of it is damaged, or the page cannot be
            written to ``--output``.
    """
    real_path("--output", request.output)
    runs = [read_run(run, name) for run, name in names_of(request.runs).items()]
    check_output(request.output)
    sections = [shared_section(runs), *(run_section(run) for run in runs)]
    try:
        write_whole(request.output, write_page(runs, sections))
        if request.png:
            folder = request.output.with_name(f"{request.output.stem}_figures")
            save_all(folder, runs, sections)
    except OSError as error:
        raise UserError(
            f"The report cannot be written to --output {request.output}: {error}. Choose another "
            "--output, or make room there."
        ) from error
    for run in runs:
        print(f"{run.name}: {run.state}, step {run.last_step}")
        for note in run.notes:
            print(f"note      {note}")
    print(f"report    {request.output}" + (f"\nfigures   {folder}" if request.png else ""))


def check_output(path: Path) -> None:
    """Raise UserError if the page cannot be written to ``path``.

    This is so if its folder does not exist, if it is a folder, a pipe or a link, or if it is a file
    that this program did not write, or that was changed since, which is never replaced.
    """
    if not path.parent.is_dir():
        raise UserError(
            f"--output {path} cannot be written, because the folder {path.parent} does not exist. "
            "Create it first."
        )
    if path.is_dir():
        raise UserError(f"--output {path} is a folder. Give a file in it as --output.")
    if is_pipe(path):
        raise UserError(f"--output {path} is a pipe or device. Give a file as --output.")
    check_replaceable(path)


def check_replaceable(path: Path) -> None:
    """Raise UserError if there is a file that ``--output`` must not replace.

    Only a page that this program wrote is replaced, and only as it was written.

    Args:
        path: value of ``--output``; it is no folder.
    """
    if path.is_symlink():
        raise UserError(
            f"--output {path} is a link, and a report would replace it. Give the path that it "
            "leads to, or another --output."
        )
    if path.exists() and not is_own_page(path.read_bytes()):
        raise UserError(
            f"--output {path} is not a report of this program, or was changed after it was "
            "written, so it is not replaced. Choose another --output, or remove it."
        )


def names_of(runs: Sequence[Path]) -> dict[Path, str]:
    """Return a unique name for every run.

    A name is the last part of the folder's path. If two runs have the same last part, all names
    have more parts, as many as make them unique.

    Args:
        runs: the run folders.

    Returns:
        Run folder -> name, in the order of ``runs``.

    Raises:
        UserError: if a folder is given twice, or its real path cannot be named.
    """
    whole = [real_path("RUN", run).parts for run in runs]  # runs/a and runs/b/../a are one folder
    if twice := [
        str(run) for run, parts in zip(runs, whole, strict=True) if whole.count(parts) > 1
    ]:
        raise UserError(
            f"A run folder is given more than once: {', '.join(twice)}. Give each one once."
        )
    for count in range(1, max(map(len, whole)) + 1):
        names = ["/".join(parts[-count:]) for parts in whole]
        if len(set(names)) == len(runs):
            break
    return dict(zip(runs, names, strict=True))


def shared_section(runs: Sequence[RunData]) -> Section:
    """Return the section with the figures that have a line for every run: loss, live entries,
    throughput and memory, and ranks of stages for runs that have stages."""
    drawn = [draw(runs) for draw in (curves.loss, curves.live, curves.throughput, curves.memory)]
    if staged := [run for run in runs if run.stages]:
        drawn.insert(2, curves.stages(staged))
    return Section(title="Over the run" if len(runs) == 1 else "Side by side", pictures=drawn)


def run_section(run: RunData) -> Section:
    """Return the section with the figures of a single run: its jobs, maps of ranks, and histograms.

    For a figure that cannot be drawn, the section has a sentence that says why.
    """
    pictures, absent = [timeline(run)], []
    if not run.decisions:
        absent.append(
            "No map of ranks: the method has made no decision, so all sites are as they began."
        )
    elif ranks.Shares(run).all_one:
        absent.append(
            "No map of ranks: ranks never change, and all entries are stepped to the end. Run "
            "launcher/show.py on a checkpoint to see how many entries are zero."
        )
    else:
        pictures += [ranks.final_map(run), ranks.growth(run)]
    for draw, what in ((spread.gates, "gates"), (spread.importance, "importance")):
        try:
            picture = draw(run)
        # The checkpoint is damaged, or the running job has just removed it (--keep_last).
        except (OSError, SafetensorError) as error:
            absent.append(f"No distribution of {what}: a checkpoint cannot be read ({error}).")
            continue
        if picture is None:
            absent.append(f"No distribution of {what}: no checkpoint of this run stores them.")
        else:
            pictures.append(picture)
    return Section(title=run.name, pictures=pictures, absent=absent)


def save_all(folder: Path, runs: Sequence[RunData], sections: Sequence[Section]) -> None:
    """Write one PNG file for each figure, and remove the PNG files of an earlier report.

    Args:
        folder: where the files are written; it is created if it does not exist. PNG files of
            somebody else in it stay.
        runs: the runs of the report. If there are several, the names of a run's own files begin
            with its number and name, as in 2_name_timeline.png.
        sections: the section that all runs share, then one section for each run.

    Raises:
        UserError: a file of somebody else has the name of a figure.
    """
    folder.mkdir(exist_ok=True)
    for path in folder.glob("*.png"):
        if GENERATOR.encode() in path.read_bytes()[:1000]:
            path.unlink()
    # Numbered, because the runs x/a_b and x_a/b would otherwise both become x_a_b.
    named = [f"{i}_{s.name.replace('/', '_')}_" for i, s in enumerate(runs, start=1)]
    prefixes = ["", *(named if len(runs) > 1 else [""])]
    paths = {
        folder / f"{prefix}{picture.name}.png": picture
        for prefix, section in zip(prefixes, sections, strict=True)
        for picture in section.pictures
    }
    if taken := [path for path in paths if os.path.lexists(path)]:
        raise UserError(
            f"{taken[0]} is not a figure of this program, so it is not replaced. Choose another "
            "--output."
        )
    for path, picture in paths.items():
        save_png(picture, path, maker=GENERATOR)
