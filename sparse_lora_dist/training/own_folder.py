"""Check that a run may write into its folder (``--output_dir``), and mark the folder as its own.

A run begins in a folder that is empty, or that a run before it has marked. Its marker
(``system/own_files.py``) lists the files and folders that the run has made in it. Whatever else is
there stays as it is; if it has a name that the run needs, the run is refused.

A run folder of a version without markers counts as marked if its run.yaml and the manifest of a
checkpoint are intact.
"""

import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from sparse_lora_dist import checkpoint
from sparse_lora_dist.adapter.peft_config import APART, LABELS, WEIGHTS
from sparse_lora_dist.checkpoint import own_files as checkpoint_files
from sparse_lora_dist.checkpoint.manifest import MANIFEST
from sparse_lora_dist.config.yaml_file import parse_yaml
from sparse_lora_dist.distributed.console import print_line
from sparse_lora_dist.errors import UserError
from sparse_lora_dist.model.prompting import GENERATION, TEMPLATE
from sparse_lora_dist.run_folder import lock
from sparse_lora_dist.run_folder.description import RUN_YAML
from sparse_lora_dist.run_folder.lost_checkpoints import signs_of_checkpoints
from sparse_lora_dist.runtime import heartbeats
from sparse_lora_dist.system.own_files import (
    MARKER,
    Content,
    Marker,
    content_of,
    foreign_in,
    in_short,
    read_marker,
    remove_own,
    write_marker,
)
from sparse_lora_dist.system.small_files import text_of
from sparse_lora_dist.system.whole_folders import EXPORT, is_filled_in_place, own_names

RUN = "run"
"""Kind of the marker of a run folder."""
TRAIN, EDIT = "launcher/train.py", "launcher/edit.py"
"""Programs that make runs."""
CHECKPOINTS, ADAPTER, TENSORBOARD = "checkpoints", "adapter", "tensorboard"
FILES = """
    run.yaml environment.json metrics.jsonl decisions.jsonl stages.jsonl bad_steps.jsonl
    attempts.jsonl edits.json
""".split()
MADE = (*FILES, CHECKPOINTS, ADAPTER, TENSORBOARD)
"""Files and folders that a run writes into its folder, besides lock, heartbeats and marker."""
HOLDS_A_RUN = ("metrics.jsonl", CHECKPOINTS)
"""Entries of MADE that show that a run has begun, and did not end before its first step."""
OF_ADAPTER = ("adapter_config.json", WEIGHTS, APART, LABELS, TEMPLATE, GENERATION)
"""Files that a run writes into the folder of its adapter."""
OF_THE_SYSTEM = re.compile(
    r"lost\+found|\.snapshot|\.nfs[0-9a-f]+|\.DS_Store|\.gitkeep|\.gitignore"
)
"""Names that file systems and tools make by themselves. No run writes or removes them."""
LEFT = re.compile(
    rf"\.tmp_({'|'.join(map(re.escape, (MARKER, lock.NAME, *FILES)))})\.[0-9a-f]{{16}}"
    r"|\.run\.lock\.(probe\.)?[0-9a-f]{32}"
)
"""Names of files that a killed job was writing."""
OPTIONS_OF_ALL_RUNS = {"model", "data", "method", "output_dir", "resume"}


def check_folder(
    folder: Path, *, begins: bool, program: str, source: Path | None = None, replaces: bool = False
) -> None:
    """Raise UserError if a run may not write into ``folder``. Nothing is written. Not a collective.

    Args:
        folder: the run folder; it need not exist.
        begins: True if the run starts from step 0, or from a checkpoint of another run.
        program: TRAIN or EDIT, the program of this run.
        source: the checkpoint of another run that this run starts from, resolved; None if there is
            none. A folder whose run began from this same checkpoint may be used again.
        replaces: True if an earlier edit run in the folder will be removed (``--overwrite``).

    Raises:
        UserError: the folder holds another run, or files that are not a run's, or a file or folder
            in it cannot be written.
    """
    _check_path(folder)
    marker = marker_of(folder) if folder.exists() else None
    if marker is None:
        _check_empty(folder)
        return
    made = marker.about.get("program")
    if made not in (None, program):
        raise UserError(
            f"--output_dir {folder} holds a run of {made}, which {program} neither continues nor "
            "replaces. Choose another --output_dir."
        )
    begun = [name for name in HOLDS_A_RUN if os.path.lexists(folder / name)]
    if replaces and made is None and begun:
        raise UserError(
            f"--overwrite cannot replace {folder}: nothing there shows that its run is an edit "
            "run. Choose another --output_dir."
        )
    came_from_there = source is not None and marker.about.get("from") == str(source)
    if begins and not replaces and begun and not came_from_there:
        _check_source(folder, source)
        raise UserError(
            f"--output_dir {folder} already holds a run. Continue it with --resume auto, or start "
            "a new run: choose another --output_dir, or remove that folder."
        )
    _check_entries(folder, marker)
    if not begins and not replaces:
        _check_keeps_its_run(folder, marker)


def _check_source(folder: Path, source: Path | None) -> None:
    """Raise UserError if ``--resume`` names something that no run can go on with in the folder of a
    run: what is no checkpoint, or one that this run has set aside."""
    if source is not None and not (source / MANIFEST).exists():
        raise UserError(
            f"--resume {source} is not a checkpoint: it has no {MANIFEST}. Give a step_... folder "
            f"of {folder / CHECKPOINTS}, or --resume auto for the newest."
        )
    if source is not None and source.parent.parent == (folder / CHECKPOINTS).resolve():
        raise UserError(
            f"--resume {source} was set aside when the run went back to an earlier step, so it can "
            "only begin another run. Choose another --output_dir, or --resume auto for the newest "
            f"checkpoint of {folder}."
        )


def _check_keeps_its_run(folder: Path, marker: Marker) -> None:
    """Raise UserError if a run that goes on with its own checkpoints has lost them all: it would
    begin at step 0, and replace what is left of itself."""
    if checkpoint.published(folder / CHECKPOINTS):
        return
    signs = signs_of_checkpoints(folder, marker.names, _own_in_adapter(folder, marker))
    if signs:
        raise UserError(
            f"--output_dir {folder} holds a run that has saved checkpoints, but none of them is "
            f"there now. It left {' and '.join(signs)}. --resume auto would begin at step 0 and "
            "replace them. Put its checkpoints back, or choose another --output_dir."
        )


def begin(folder: Path, *, program: str, source: Path | None) -> None:
    """Mark a run folder as this run's, and remove half-written files that a killed job left there.

    For rank 0 only, after ``check_folder``, by a job that holds the lock.

    Args:
        folder: the run folder.
        program: TRAIN or EDIT, the program of this run.
        source: the checkpoint of another run that this run starts from, resolved, or None.
    """
    marker = marker_of(folder) or Marker(kind=RUN)
    if marker.about.get("before"):
        _mark_adapter(folder, marker)
    about = {"program": program, "from": None if source is None else str(source)}
    about |= {n: v for n in about if (v := marker.about.get(n)) is not None}
    wanted = Marker(kind=RUN, names=marker.names, about=about)
    if read_marker(folder) != wanted:
        write_marker(folder, wanted)
    for path in list(folder.iterdir()):
        if LEFT.fullmatch(path.name) and path.is_file() and not path.is_symlink():
            path.unlink(missing_ok=True)


def _mark_adapter(folder: Path, marker: Marker) -> None:
    adapter, is_own = (folder / ADAPTER).resolve(), _own_in_adapter(folder, marker)
    if ADAPTER in marker.names and read_marker(adapter) is None:
        names = {p.name: content_of(p) for p in sorted(adapter.iterdir()) if is_own(p.name)}
        write_marker(adapter, Marker(kind=EXPORT, names=names))


def clear(folder: Path) -> None:
    """Remove what an earlier run wrote into the run folder ``folder``, except lock and marker.

    Files of somebody else stay, also those in the folders of the run. For rank 0 only, after
    ``check_folder`` with ``replaces``.

    Raises:
        OSError: a file of the earlier run cannot be removed.
    """
    marker = marker_of(folder)
    if marker is None:
        return
    for name in FILES:
        if name in marker.names:
            (folder / name).unlink(missing_ok=True)
    steps = folder / CHECKPOINTS
    if CHECKPOINTS in marker.names and steps.is_dir():
        for step in checkpoint.published(steps):
            checkpoint_files.remove(step)
            if (step / MANIFEST).exists():  # it would be taken for the new run's
                raise OSError(f"{step} cannot be removed")
        checkpoint.clean(steps)
        (steps / checkpoint_files.LATEST).unlink(missing_ok=True)
    _remove_inside(folder, marker, CHECKPOINTS, lambda name: False)
    _remove_inside(folder, marker, ADAPTER, _own_in_adapter(folder, marker))
    _remove_inside(folder, marker, TENSORBOARD, lambda name: name.startswith("events.out.tfevents"))
    left = {name: None for name in marker.names if os.path.lexists(folder / name)}
    write_marker(folder, Marker(kind=RUN, names=left, about=marker.about))


def begin_adapter(folder: Path) -> None:
    """List the adapter in the marker of the run folder, before it is written. For rank 0 only."""
    _list_adapter(folder, None)


def end_adapter(folder: Path) -> None:
    """Note in the marker of the run folder which weights the run wrote as its adapter, so that
    those of another run are known. For rank 0 only."""
    weights = folder / ADAPTER / WEIGHTS
    if weights.is_file():
        _list_adapter(folder, content_of(weights))


def _list_adapter(folder: Path, content: Content | None) -> None:
    marker = read_marker(folder)
    if marker is not None:
        write_marker(folder, replace(marker, names={**marker.names, ADAPTER: content}))


def remove_adapter(folder: Path) -> None:
    """Remove the adapter that an earlier job of the run wrote into the run folder ``folder``. For
    rank 0 only. Files of somebody else stay, and no error is raised."""
    marker = marker_of(folder)
    if marker is not None:
        _remove_inside(folder, marker, ADAPTER, _own_in_adapter(folder, marker))
        if not os.path.lexists(folder / ADAPTER):
            left = {name: c for name, c in marker.names.items() if name != ADAPTER}
            write_marker(folder, Marker(kind=RUN, names=left, about=marker.about))


def marker_of(folder: Path) -> Marker | None:
    """Return the marker of a run folder. For a run of a version without markers, return the one
    that it would have. Return None for any other folder."""
    marker = read_marker(folder)
    if marker is not None:
        return marker if marker.kind == RUN else None
    return None if os.path.lexists(folder / MARKER) else _marker_of_before(folder)


def _marker_of_before(folder: Path) -> Marker | None:
    if not is_run_yaml(folder / RUN_YAML):
        return None
    about: dict[str, Any] = {"program": None, "from": None}
    names = [*FILES]
    newest = _newest_manifest(folder / CHECKPOINTS)
    if newest is not None:
        names = [*MADE]
        is_edit = "rows" in newest["description"]
        about["program"] = EDIT if is_edit else TRAIN
        # Names of the files in its adapter folder, which has no marker either.
        labels = [LABELS] if "classes" in newest["description"] else []
        about["before"] = ["adapter_config.json", WEIGHTS, *labels]
    elif _has_only_unfinished(folder / CHECKPOINTS):
        names += [CHECKPOINTS, TENSORBOARD]
    there = {name: None for name in names if os.path.lexists(folder / name)}
    return Marker(kind=RUN, names=there, about=about)


def is_run_yaml(path: Path) -> bool:
    """Return True if a file is the run.yaml of a run: a YAML map with the options of all runs."""
    try:
        if path.is_symlink() or not path.is_file():
            return False
        content = parse_yaml(text_of(path))
    except (OSError, ValueError, yaml.YAMLError):
        return False
    return isinstance(content, dict) and content.keys() >= OPTIONS_OF_ALL_RUNS


def _newest_manifest(steps: Path) -> Mapping[str, Any] | None:
    for step in reversed(checkpoint.published(steps)):
        try:
            manifest = checkpoint.read_manifest(step)
        except (UserError, OSError):
            continue
        if isinstance(manifest.get("description"), dict):
            return manifest
    return None


def _has_only_unfinished(steps: Path) -> bool:
    if not steps.is_dir():
        return False
    return all(checkpoint_files.LEFT.fullmatch(path.name) for path in steps.iterdir())


def _check_path(folder: Path) -> None:
    """Check the path of a run folder, and that a folder can be made there or written into."""
    if os.path.lexists(folder) and not folder.is_dir():
        what = "is a link that leads to no folder" if folder.is_symlink() else "is no folder"
        raise UserError(f"--output_dir {folder} {what}. Choose another --output_dir.")
    probe = folder if folder.exists() else next(p for p in folder.absolute().parents if p.exists())
    if not (probe.is_dir() and os.access(probe, os.W_OK | os.X_OK)):
        raise UserError(
            f"--output_dir {folder} cannot be used, since {probe} is not writable. Choose another "
            "--output_dir."
        )


def _check_empty(folder: Path) -> None:
    """Raise UserError if a folder without a marker holds anything but what a job leaves that was
    killed before it made the marker."""
    found = sorted(p.name for p in folder.iterdir() if not _is_left(p)) if folder.exists() else []
    if MARKER in found:
        raise UserError(
            f"{folder / MARKER}, which says what the run has written, cannot be read or is "
            "damaged. Give yourself access to it (chmod), or restore it. If the rest of the folder "
            "is intact, it may be removed: the run then goes on by its run.yaml and checkpoints."
        )
    if found:
        raise UserError(
            f"--output_dir {folder} is neither empty nor the folder of a run: it holds "
            f"{in_short(found)}. A run begins in an empty folder, so that it can never replace "
            "files of others. Choose another --output_dir, or move these files away."
        )


def _is_left(path: Path) -> bool:
    if OF_THE_SYSTEM.fullmatch(path.name) or LEFT.fullmatch(path.name):
        return True
    if path.name == lock.NAME:
        return lock.is_lock(path)
    is_ranks = path.name == heartbeats.FOLDER and path.is_dir() and not path.is_symlink()
    return is_ranks and all(heartbeats.is_own(file) for file in path.iterdir())


def _check_entries(folder: Path, marker: Marker) -> None:
    """Raise UserError if an entry of a run folder has a name that the run needs, but is not the
    run's or cannot be written."""
    for name in MADE:
        # A job claims a name before it uses it; so does one that is being killed just now.
        is_new = name == CHECKPOINTS and _has_only_unfinished(folder / name)
        if os.path.lexists(folder / name) and name not in marker.names and not is_new:
            raise _not_ours(folder / name, "which this run has not made")
    for name in FILES:
        path = folder / name
        if path.is_symlink() or (path.exists() and not path.is_file()):
            raise _not_ours(path, "which is a link or a folder, but this program makes a file")
    for name in (CHECKPOINTS, TENSORBOARD, ADAPTER, heartbeats.FOLDER):
        path = folder / name
        if os.path.lexists(path) and not path.is_dir():
            raise _not_ours(path, "which is no folder, or a link that leads to none")
        if path.exists() and not os.access(path, os.W_OK | os.X_OK):
            raise UserError(
                f"{path} is not writable, but the run needs it later. Change its permissions, or "
                "choose another --output_dir."
            )
    _check_ranks(folder / heartbeats.FOLDER)
    for path in (folder / CHECKPOINTS).glob("step_*"):
        if checkpoint.step_of(path) is not None and not path.is_dir():
            raise _not_ours(path, "which is no folder, or a link that leads to none")
    _check_adapter(folder, marker)


def _check_ranks(ranks: Path) -> None:
    if ranks.is_symlink():
        raise _not_ours(ranks, "which is a link")
    for path in ranks.iterdir() if ranks.is_dir() else ():
        if heartbeats.FILE.fullmatch(path.name) and not heartbeats.is_own(path):
            raise _not_ours(path, "which no rank has written")


def _check_adapter(folder: Path, marker: Marker) -> None:
    adapter = (folder / ADAPTER).resolve()
    if not adapter.is_dir():
        return
    weights, written = adapter / WEIGHTS, marker.names.get(ADAPTER)
    if written is not None and weights.is_file() and content_of(weights) != written:
        raise _not_ours(folder / ADAPTER / WEIGHTS, "which another run or export has written")
    is_own = _own_in_adapter(folder, marker)
    if taken := [n for n in foreign_in(adapter, is_own) if n in OF_ADAPTER]:
        raise _not_ours(folder / ADAPTER / taken[0], "whose content this run has not written")
    if not is_filled_in_place(adapter) and not os.access(adapter.parent, os.W_OK):
        raise UserError(f"{adapter.parent} is not writable. Change its permissions.")


def _own_in_adapter(folder: Path, marker: Marker) -> Callable[[str], bool]:
    """Return a function that takes the name of an entry of the run's adapter folder, and returns
    True if the run has written that file. Versions without markers wrote files of known names."""
    adapter = (folder / ADAPTER).resolve()
    before = marker.about.get("before", [])
    if read_marker(adapter) is None and before:
        return lambda name: name in before and (adapter / name).is_file()
    return own_names(adapter)


def _remove_inside(folder: Path, marker: Marker, name: str, is_own: Callable[[str], bool]) -> None:
    """Remove the run's files from one of its folders, and the folder, unless it is a link or holds
    other files."""
    if name not in marker.names or not (folder / name).is_dir():
        return
    is_link = (folder / name).is_symlink()
    left = remove_own((folder / name).resolve(), is_own, keeps_folder=is_link)
    if left is not None:
        print_line("note", left)


def _not_ours(path: Path, why: str) -> UserError:
    return UserError(
        f"--output_dir holds {path}, {why}. The run would replace it. Move it away, or choose "
        "another --output_dir."
    )


def records(folder: Path) -> Iterable[Path]:
    """Return the paths of the files that describe what a run has done, whether they exist or not:
    run.yaml and the JSON Lines files."""
    return [folder / name for name in FILES if name.endswith((".yaml", ".jsonl"))]
