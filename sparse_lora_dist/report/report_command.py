"""launcher/report.py: folders in, a page out."""

from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError

from sparse_lora_dist.errors import UserError
from sparse_lora_dist.report import curves, ranks
from sparse_lora_dist.report import distributions as spread
from sparse_lora_dist.report.page import GENERATOR, Section, write_page
from sparse_lora_dist.report.report_options import ReportRequest
from sparse_lora_dist.report.run_data import RunData, read_run
from sparse_lora_dist.report.style import save_png
from sparse_lora_dist.report.timeline import timeline
from sparse_lora_dist.system.atomic_files import write_whole


def report(request: ReportRequest) -> None:
    """Write what the request asks, and say where it is.

    Raises:
        UserError: a folder is no run, or something else stands where the page would.
    """
    runs = [read_run(run, name) for run, name in names_of(request.runs).items()]
    check_output(request.output)
    sections = [together(runs), *(of_one(run) for run in runs)]
    try:
        write_whole(request.output, write_page(runs, sections))
        if request.png:
            folder = request.output.with_name(f"{request.output.stem}_figures")
            save_all(folder, runs, sections)
    except OSError as error:
        raise UserError(f"--output {request.output}: {error}") from error
    for run in runs:
        print(f"{run.name}: {run.state}, step {run.last_step}")
    print(f"report    {request.output}" + (f"\nfigures   {folder}" if request.png else ""))


def check_output(path: Path) -> None:
    """Raises UserError where the page has no place, or would replace what is no report."""
    if not path.parent.is_dir():
        raise UserError(f"--output {path}: there is no folder {path.parent}.")
    if path.is_dir():
        raise UserError(f"--output {path} is a folder; name a file in it.")
    if path.exists() and GENERATOR not in path.read_text(errors="replace")[:1000]:
        raise UserError(f"{path} is no report of this program, and stays. Give another --output.")


def names_of(runs: Sequence[Path]) -> dict[Path, str]:
    """The last part of each folder's path, or as many as tell them apart."""
    whole = [run.resolve().parts for run in runs]  # runs/a and runs/a/ are one
    if twice := [
        str(run) for run, parts in zip(runs, whole, strict=True) if whole.count(parts) > 1
    ]:
        raise UserError(f"a run is named twice: {', '.join(twice)}")
    for count in range(1, max(map(len, whole)) + 1):
        names = ["/".join(parts[-count:]) for parts in whole]
        if len(set(names)) == len(runs):
            break
    return dict(zip(runs, names, strict=True))


def together(runs: Sequence[RunData]) -> Section:
    """All runs in one figure each."""
    drawn = [draw(runs) for draw in (curves.loss, curves.live, curves.throughput, curves.memory)]
    if staged := [run for run in runs if run.stages]:
        drawn.insert(2, curves.stages(staged))
    return Section(title="Over the run" if len(runs) == 1 else "Side by side", pictures=drawn)


def of_one(run: RunData) -> Section:
    """What cannot share axes with another run's."""
    pictures, absent = [timeline(run)], []
    if not run.decisions:
        absent.append(
            "No map of ranks: the method has made no decision, every linear is as it was."
        )
    elif ranks.Shares(run).say_nothing:
        absent.append(
            "No map of ranks: they never change, and all entries are stepped to the end. How many "
            "of them are zero launcher/show.py says of a checkpoint."
        )
    else:
        pictures += [ranks.final_map(run), ranks.growth(run)]
    for draw, what in ((spread.gates, "gates"), (spread.importance, "importance")):
        try:
            picture = draw(run)
        # Damaged, or --keep_last has just removed it.
        except (OSError, SafetensorError) as error:
            absent.append(f"No distribution of {what}: {error}")
            continue
        if picture is None:
            absent.append(f"No distribution of {what}: no checkpoint here has any.")
        else:
            pictures.append(picture)
    return Section(title=run.name, pictures=pictures, absent=absent)


def save_all(folder: Path, runs: Sequence[RunData], sections: Sequence[Section]) -> None:
    """A PNG a picture, instead of those of an earlier report; those of one of several runs bear its
    place and name."""
    folder.mkdir(exist_ok=True)
    for path in folder.glob("*.png"):
        if GENERATOR.encode() in path.read_bytes()[:1000]:
            path.unlink()
    # By name alone x/a_b and x_a/b would be the same.
    named = [f"{i}_{s.name.replace('/', '_')}_" for i, s in enumerate(runs, start=1)]
    prefixes = ["", *(named if len(runs) > 1 else [""])]
    for prefix, section in zip(prefixes, sections, strict=True):
        for picture in section.pictures:
            save_png(picture, folder / f"{prefix}{picture.name}.png", maker=GENERATOR)
