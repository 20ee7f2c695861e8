"""Any tree of files in and around a run folder, and what the programs do to it.

A tree is a folder in one of a few states, with files and links of a user under names that the
programs use or might use. After any action each file of the user's is what and where it was.
"""

import io
import os
import shutil
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from sparse_lora_dist.errors import UserError
from sparse_lora_dist.export.export_command import export
from sparse_lora_dist.export.export_options import load_request
from tests.work.folders import edited, tried

STATES = ("absent", "empty", "run", "run of before", "edits", "export")
ALLOWED = {
    "start": ("absent", "empty"),
    "resume": ("absent", "empty", "run", "run of before"),
    "fork": ("absent", "empty"),
    "edit": ("absent", "empty"),
    "overwrite": ("absent", "empty", "edits"),
    "export": ("absent", "empty"),
    "export anew": ("absent", "empty", "export"),
}
"""Action -> the states in which it goes through where the user has put nothing in the folder."""
OVER_OWN = [("run", "resume"), ("run of before", "resume"), ("edits", "overwrite")]
OVER_OWN += [("export", "export anew")]
PAIRS = [*OVER_OWN * 12, *((state, action) for state in STATES for action in ALLOWED)]
"""States and actions to draw from: half of them go through although a folder holds something."""
MINE = b"the user's own"
PLACES = """
    notes.txt run.lock ranks ranks/r.csv ranks/rank_00000.json run.yaml metrics.jsonl stages.jsonl
    bad_steps.jsonl edits.json environment.json .sparse_lora_dist.json .tmp_metrics.jsonl
    adapter adapter/NOTES.md adapter/README.md adapter/adapter_config.json
    adapter/adapter_model.safetensors adapter/generation_config.json adapter/sub/deep.bin
    checkpoints checkpoints/mine.txt checkpoints/latest/x checkpoints/step_00000001/NOTES
    checkpoints/step_00000002/rank_00007.safetensors checkpoints/step_00000003
    checkpoints/step_00000003/manifest.json checkpoints/step_00000001_backup/manifest.json
    checkpoints/.tmp_step_00000009/NOTES checkpoints/.removed_mine/x checkpoints/.replaced_mine/x
    checkpoints/set_aside_1/x tensorboard/mine tensorboard wandb/x README.md model.safetensors
    adapter_config.json adapter_model.safetensors sub/deep.bin
""".split()
"""Where a user may have put a file, below the output folder."""
AROUND = """
    .tmp_out .tmp_adapter/x .tmp_out.0123456789abcdef/x .replaced_out.0123456789abcdef/x
    .replaced_out/x .tmp_out-4711/x .tmp_out.0123456789abcdef other/run.yaml .run.lock.probe.0
""".split()
"""Where, beside the output folder."""
LINKS = ("adapter", "checkpoints", "ranks", "metrics.jsonl", "run.lock", "latest", "stages.jsonl")
"""What may be a link of the user's, to a folder of his, to a file of his, or to nothing."""


@dataclass(frozen=True)
class Tree:
    """A state of the output folder, and what a user has put in it and beside it."""

    state: str
    action: str
    files: tuple[str, ...]
    around: tuple[str, ...]
    link: tuple[str, str] | None


def trees() -> st.SearchStrategy[Tree]:
    return st.builds(
        lambda pair, **more: Tree(state=pair[0], action=pair[1], **more),
        st.sampled_from(PAIRS),
        files=st.lists(st.sampled_from(PLACES), max_size=3, unique=True).map(tuple),
        around=st.lists(st.sampled_from(AROUND), max_size=2, unique=True).map(tuple),
        link=st.none() | st.tuples(st.sampled_from(LINKS), st.sampled_from(["d", "f", "nothing"])),
    )


def users_files_stay(
    folder: Path,
    made: dict[str, str],
    words: dict[str, list[str]],
    examples: int,
    derandomize: bool,
) -> dict[str, int]:
    """Try ``examples`` trees below ``folder``.

    Args:
        folder: where the trees are made.
        made: state -> a folder in this state, which is copied.
        words: program -> command line without the options that name folders.
        examples: number of trees.
        derandomize: True for the same trees each time.

    Returns:
        "done" and "refused" -> number of trees in which the action went through, or did not.
    """
    counts = {"done": 0, "refused": 0}

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=derandomize,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(trees())
    def holds(tree: Tree) -> None:
        place = folder / f"tree_{sum(counts.values())}"
        out = _planted(place, tree, made)
        users = _snapshot(place, out, tree)
        said = _do(tree.action, out, place, made, words)
        counts["refused" if said.startswith("error: ") else "done"] += 1
        after = {path: _entry(_now_at(place / path)) for path in users}
        assert after == users, (tree, said)
        if not tree.files and tree.link is None:
            _goes_through(tree, said)

    holds()
    return counts


def _planted(place: Path, tree: Tree, made: dict[str, str]) -> Path:
    """Make a tree; return its output folder."""
    out = place / "out"
    place.mkdir()
    if tree.state == "empty":
        out.mkdir()
    elif tree.state != "absent":
        shutil.copytree(made[tree.state], out, symlinks=True)
    (place / "users" / "folder").mkdir(parents=True)
    for name in ("users/file", "users/folder/x", "users/folder/adapter_config.json"):
        (place / name).write_bytes(MINE)
    if tree.link is not None and not os.path.lexists(out / tree.link[0]) and out.is_dir():
        target = {"d": "users/folder", "f": "users/file", "nothing": "users/nothing"}[tree.link[1]]
        (out / tree.link[0]).symlink_to(place / target)
    for path in (*(out / name for name in tree.files), *(place / name for name in tree.around)):
        _plant(path, place, may_replace=tree.state != "run of before")
    return out


def _plant(path: Path, place: Path, *, may_replace: bool) -> None:
    """A file of the user's, unless something stands in the way. One of the programs' files that
    they do not change once it is written may be overwritten by the user; not in a folder without
    markers, in which a file counts by its name."""
    parents = [p for p in path.parents if p.is_relative_to(place)]
    if any(os.path.lexists(p) and (p.is_symlink() or not p.is_dir()) for p in parents):
        return
    fixed = (
        may_replace and path.parent.name == "adapter" and path.suffix in (".json", ".safetensors")
    )
    if os.path.lexists(path) and not fixed:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(MINE)


def _snapshot(place: Path, out: Path, tree: Tree) -> dict[str, Any]:
    """Every file and link that the programs have not made."""
    found = {}
    for root, folders, files in os.walk(place):
        for name in (*files, *folders):
            path = Path(root) / name
            is_users = path.is_symlink() or (path.is_file() and path.read_bytes() == MINE)
            if is_users or (path.is_file() and not path.is_relative_to(out)):
                found[str(path.relative_to(place))] = _entry(path)
    return found


def _now_at(path: Path) -> Path:
    """Where a file is now: a checkpoint that is damaged, which may be the user's own, is kept under
    another name if its step is saved again."""
    step = path.parent
    kept = step.parent / "set_aside_1" / step.name / path.name
    is_damaged = step.name == "step_00000003" and path.name == "manifest.json"
    return kept if is_damaged and not path.read_bytes() == MINE else path


def _entry(path: Path) -> Any:
    if path.is_symlink():
        return "link", os.readlink(path)
    return ("file", path.read_bytes()) if path.is_file() else "nothing"


def _do(
    action: str, out: Path, place: Path, made: dict[str, str], words: dict[str, list[str]]
) -> str:
    """Run a program; return what it printed, or "error: " with its message."""
    folder = ["--output_dir", str(out)]
    fork = str(Path(made["run"]) / "checkpoints" / "step_00000001")
    actions: dict[str, Callable[[], str]] = {
        "start": lambda: tried([*words["train"], *folder]),
        "resume": lambda: tried([*words["train"], *folder, "--resume", "auto"]),
        "fork": lambda: tried([*words["train"], *folder, "--resume", fork]),
        "edit": lambda: edited([*words["edit"], *folder]),
        "overwrite": lambda: edited([*words["edit"], *folder, "--overwrite", "true"]),
        "export": lambda: exported([made["run"], "--output", str(out)]),
        "export anew": lambda: exported([made["run"], "--output", str(out), "--overwrite"]),
    }
    return actions[action]()


def exported(argv: list[str]) -> str:
    with redirect_stdout(io.StringIO()) as out:
        try:
            export(load_request(argv))
        except UserError as error:
            return f"error: {error}"
    return out.getvalue()


def _goes_through(tree: Tree, said: str) -> None:
    """Without anything of the user's in the folder, an action in a state that allows it is done."""
    assert said.startswith("error: ") != (tree.state in ALLOWED[tree.action]), (tree, said)
